//! Matrix products, attention, norms and the optimiser update over slices, forward and backward.
