//! Worlds that several systems share: problems with an oracle that knows what every answer is worth.

pub mod attribute_text;
