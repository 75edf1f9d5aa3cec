//! A linear layer of the block: one or several projections of the same input computed as one product, each with an
//! optional bias and an optional low-rank adapter.

use std::ops::Range;

use kernels::{Int8Matrix, Matrix, MatrixMut, Onto, PackedMatrix, Precision, matmul};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::parameters::{Gradients, Layout};
use crate::error::Result;
use crate::weights::Source;

/// How the weights of products are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// As the precision says.
    #[default]
    Full,
    /// Rounded to 8 bits in blocks of 32 that share a scale. Adapters, norms, biases and input embeddings stay as they are.
    Int8,
}

/// Projections that share their input; their weights are neighbours in the flat storage.
#[derive(Clone)]
pub(super) struct Linear {
    /// The modules' names without `.weight`, such as `model.layers.0.self_attn.q_proj`, and their output sizes.
    pub modules: Vec<(String, usize)>,
    pub inputs: usize,
    pub outputs: usize,
    /// `outputs × inputs` in the base parameters.
    pub weight: Range<usize>,
    /// `outputs` in the base parameters.
    pub bias: Option<Range<usize>>,
    /// The transposed weight, `inputs × outputs`; without it, products pack as they go.
    packed: Option<PackedMatrix>,
    /// The same in 8 bits, where generation asks for it.
    int8: Option<Int8Matrix>,
    pub adapter: Option<Adapter>,
}

/// The adapters of a [`Linear`]'s projections.
#[derive(Clone)]
pub(super) struct Adapter {
    pub rank: usize,
    pub scale: f32,
    /// The A of each adapted projection, one below the other: `parts.len() * rank × inputs` in the adapter parameters.
    pub a: Range<usize>,
    packed_a: Option<PackedMatrix>,
    pub parts: Vec<AdapterPart>,
}

/// One projection's B.
#[derive(Clone)]
pub(super) struct AdapterPart {
    /// The projection's outputs within those of the whole layer.
    pub columns: Range<usize>,
    /// `columns.len() × rank` in the adapter parameters.
    pub b: Range<usize>,
    packed_b: Option<PackedMatrix>,
}

impl Adapter {
    /// Width of `A x` for all projections.
    pub fn width(&self) -> usize {
        self.parts.len() * self.rank
    }
}

/// What a product needs to know beside its operands.
#[derive(Clone, Copy)]
pub(super) struct Products<'a> {
    pub precision: Precision,
    /// The packed base weights that a forward reads.
    pub format: WeightFormat,
    /// The base parameters, flat.
    pub base: &'a [f32],
    /// The adapter parameters, flat; `None` switches adapters off.
    pub adapter: Option<&'a [f32]>,
}

impl Products<'_> {
    /// Whether the base weights are what is trained.
    pub fn trains_base(&self) -> bool {
        self.adapter.is_none()
    }
}

impl Linear {
    /// Lays out the weights and then the biases of `modules`, given as (name, outputs).
    pub fn new(layout: &mut Layout, modules: Vec<(String, usize)>, inputs: usize, bias: bool) -> Self {
        let join = |ranges: Vec<Range<usize>>| ranges[0].start..ranges[ranges.len() - 1].end;
        let weights = modules.iter().map(|(name, n)| layout.push(format!("{name}.weight"), vec![*n, inputs])).collect();
        let bias =
            bias.then(|| modules.iter().map(|(name, n)| layout.push(format!("{name}.bias"), vec![*n])).collect());
        let outputs = modules.iter().map(|(_, n)| n).sum();
        Self {
            modules,
            inputs,
            outputs,
            weight: join(weights),
            bias: bias.map(join),
            packed: None,
            int8: None,
            adapter: None,
        }
    }

    /// Lays out adapters for the projections that `adapted` picks by name. Returns the ranges of the As and of the Bs.
    pub fn attach(
        &mut self,
        layout: &mut Layout,
        rank: usize,
        scale: f32,
        adapted: impl Fn(&str) -> bool,
        key: impl Fn(&str, char) -> String,
    ) {
        let chosen: Vec<&(String, usize)> = self.modules.iter().filter(|(name, _)| adapted(name)).collect();
        let mut a = layout.len..layout.len;
        for (name, _) in &chosen {
            a.end = layout.push(key(name, 'A'), vec![rank, self.inputs]).end;
        }
        let mut parts = Vec::new();
        let mut first = 0;
        for (name, outputs) in &self.modules {
            if adapted(name) {
                let b = layout.push(key(name, 'B'), vec![*outputs, rank]);
                parts.push(AdapterPart { columns: first..first + outputs, b, packed_b: None });
            }
            first += outputs;
        }
        self.adapter = (!parts.is_empty()).then_some(Adapter { rank, scale, a, packed_a: None, parts });
    }

    /// Packs the weight for [`Linear::forward`].
    pub fn pack_base(&mut self, precision: Precision, base: &[f32]) {
        let weight = Matrix::new(&base[self.weight.clone()], self.outputs, self.inputs);
        pack(&mut self.packed, precision, weight.transposed());
    }

    /// The names of the weights.
    pub fn weights(&self) -> impl Iterator<Item = String> {
        self.modules.iter().map(|(name, _)| format!("{name}.weight"))
    }

    /// Packs the weight for [`Linear::forward`] from where it lies.
    pub fn pack_from(&mut self, precision: Precision, weights: &impl Source) -> Result<()> {
        let packed = self.packed.insert(PackedMatrix::new(precision, self.inputs, self.outputs));
        let mut weight = Vec::new();
        let mut column = 0;
        for (name, outputs) in &self.modules {
            weight.resize(outputs * self.inputs, 0.0);
            weights.read(&format!("{name}.weight"), &mut weight)?;
            packed.pack(column, Matrix::new(&weight, *outputs, self.inputs).transposed());
            column += outputs;
        }
        Ok(())
    }

    /// Packs the weight in 8 bits.
    pub fn pack_int8(&mut self, precision: Precision, base: &[f32]) {
        let weight = Matrix::new(&base[self.weight.clone()], self.outputs, self.inputs);
        pack_int8(&mut self.int8, precision, weight.transposed());
    }

    /// Gives back the packed weight.
    pub fn release_base(&mut self) {
        self.packed = None;
    }

    /// Packs the adapter for [`Linear::forward`].
    pub fn pack_adapter(&mut self, precision: Precision, parameters: &[f32]) {
        let inputs = self.inputs;
        if let Some(adapter) = &mut self.adapter {
            let a = Matrix::new(&parameters[adapter.a.clone()], adapter.width(), inputs);
            pack(&mut adapter.packed_a, precision, a.transposed());
            for part in &mut adapter.parts {
                let b = Matrix::new(&parameters[part.b.clone()], part.columns.len(), adapter.rank);
                pack(&mut part.packed_b, precision, b.transposed());
            }
        }
    }

    /// Bytes of the packed copies.
    pub fn packed_bytes(&self) -> usize {
        self.packed.as_ref().map_or(0, PackedMatrix::bytes) + self.int8.as_ref().map_or(0, Int8Matrix::bytes)
    }

    /// `y = onto + x Wᵀ + bias + scale · (x Aᵀ) Bᵀ`, where without `onto` the sums start from zero. `low_rank` receives `scale · x Aᵀ`.
    pub fn forward(
        &self,
        products: Products<'_>,
        x: &[f32],
        onto: Option<&[f32]>,
        y: &mut [f32],
        low_rank: &mut [f32],
    ) {
        let rows = x.len() / self.inputs;
        let weight = Matrix::new(&products.base[self.weight.clone()], self.outputs, self.inputs).transposed();
        let (x_rows, y_rows) = (Matrix::new(x, rows, self.inputs), MatrixMut::new(y, rows, self.outputs));
        let onto = onto.map_or(Onto::Zero, |onto| Onto::Rows(Matrix::new(onto, rows, self.outputs)));
        multiply(products, &self.packed, &self.int8, x_rows, weight, y_rows, onto);
        if let Some(bias) = &self.bias {
            kernels::add_bias(y, &products.base[bias.clone()]);
        }
        if let (Some(adapter), true) = (&self.adapter, products.adapter.is_some()) {
            self.forward_low_rank(products, x, low_rank);
            let width = adapter.width();
            for (index, part) in adapter.parts.iter().enumerate() {
                let low_rank =
                    Matrix::new(&low_rank[index * adapter.rank..], rows, adapter.rank).with_row_stride(width);
                let y = MatrixMut::new(&mut y[part.columns.start..], rows, part.columns.len())
                    .with_row_stride(self.outputs);
                prepared(&part.packed_b).matmul(low_rank, y, Onto::Held);
            }
        }
    }

    /// The part of [`Linear::forward`] that its gradient needs: `low_rank` receives `scale · x Aᵀ`.
    pub fn forward_low_rank(&self, products: Products<'_>, x: &[f32], low_rank: &mut [f32]) {
        if let (Some(adapter), true) = (&self.adapter, products.adapter.is_some()) {
            let rows = x.len() / self.inputs;
            let low_rank = &mut low_rank[..rows * adapter.width()];
            let product = MatrixMut::new(low_rank, rows, adapter.width());
            prepared(&adapter.packed_a).matmul(Matrix::new(x, rows, self.inputs), product, Onto::Zero);
            kernels::scale(low_rank, adapter.scale);
        }
    }

    /// The gradient of [`Linear::forward`] with respect to its input, `dx = dy W` (and through the adapter), where it is asked for. With
    /// an adapter it leaves the gradient of `low_rank`, `scale · dy B`, in `d_low_rank` for [`Linear::weight_gradients`].
    pub fn input_gradient(&self, products: Products<'_>, dy: &[f32], dx: Option<&mut [f32]>, d_low_rank: &mut [f32]) {
        let rows = dy.len() / self.outputs;
        let precision = products.precision;
        let mut dx = dx;
        if let Some(dx) = dx.as_deref_mut() {
            let d_outputs = Matrix::new(dy, rows, self.outputs);
            let weight = Matrix::new(&products.base[self.weight.clone()], self.outputs, self.inputs);
            matmul(precision, d_outputs, weight, MatrixMut::new(dx, rows, self.inputs), Onto::Zero);
        }
        let (Some(parameters), Some(adapter)) = (products.adapter, &self.adapter) else { return };
        let (rank, width) = (adapter.rank, adapter.width());
        let d_low_rank = &mut d_low_rank[..rows * width];
        for (index, part) in adapter.parts.iter().enumerate() {
            let outputs = part.columns.len();
            let dy = Matrix::new(&dy[part.columns.start..], rows, outputs).with_row_stride(self.outputs);
            let b = Matrix::new(&parameters[part.b.clone()], outputs, rank);
            let d_low_rank = MatrixMut::new(&mut d_low_rank[index * rank..], rows, rank).with_row_stride(width);
            matmul(precision, dy, b, d_low_rank, Onto::Zero);
        }
        kernels::scale(d_low_rank, adapter.scale);
        if let Some(dx) = dx {
            let d_low_rank = Matrix::new(d_low_rank, rows, width);
            let a = Matrix::new(&parameters[adapter.a.clone()], width, self.inputs);
            matmul(precision, d_low_rank, a, MatrixMut::new(dx, rows, self.inputs), Onto::Held);
        }
    }

    /// The gradients of [`Linear::forward`] with respect to the weights that are trained, added to `gradients`; after
    /// [`Linear::input_gradient`]. With an adapter the base weights are frozen and cost nothing.
    pub fn weight_gradients(
        &self,
        products: Products<'_>,
        x: &[f32],
        dy: &[f32],
        low_rank: &[f32],
        d_low_rank: &[f32],
        gradients: &mut Gradients,
    ) {
        let rows = x.len() / self.inputs;
        let precision = products.precision;
        let x = Matrix::new(x, rows, self.inputs);
        if products.trains_base() {
            let d_outputs = Matrix::new(dy, rows, self.outputs);
            let (d_weight, onto) = gradients.range_to_write(&self.weight);
            let d_weight = MatrixMut::new(d_weight, self.outputs, self.inputs);
            matmul(precision, d_outputs.transposed(), x, d_weight, onto);
            if let Some(bias) = &self.bias {
                kernels::bias_backward(dy, gradients.range_mut(bias));
            }
            return;
        }
        let Some(adapter) = &self.adapter else { return };
        let (rank, width) = (adapter.rank, adapter.width());
        for (index, part) in adapter.parts.iter().enumerate() {
            let outputs = part.columns.len();
            let dy = Matrix::new(&dy[part.columns.start..], rows, outputs).with_row_stride(self.outputs);
            let low_rank = Matrix::new(&low_rank[index * rank..], rows, rank).with_row_stride(width);
            let d_b = MatrixMut::new(gradients.range_mut(&part.b), outputs, rank);
            matmul(precision, dy.transposed(), low_rank, d_b, Onto::Held);
        }
        let d_low_rank = Matrix::new(&d_low_rank[..rows * width], rows, width);
        let d_a = MatrixMut::new(gradients.range_mut(&adapter.a), width, self.inputs);
        matmul(precision, d_low_rank.transposed(), x, d_a, Onto::Held);
    }

    /// Adds `scale · B A` to the weight and drops the adapter. Always in f32.
    pub fn merge(&mut self, base: &mut [f32], parameters: &[f32]) {
        let Some(adapter) = self.adapter.take() else { return };
        let weight = &mut base[self.weight.clone()];
        for (index, part) in adapter.parts.iter().enumerate() {
            let outputs = part.columns.len();
            let scaled: Vec<f32> = parameters[part.b.clone()].iter().map(|b| b * adapter.scale).collect();
            let b = Matrix::new(&scaled, outputs, adapter.rank);
            let a = &parameters[adapter.a.clone()][index * adapter.rank * self.inputs..][..adapter.rank * self.inputs];
            let a = Matrix::new(a, adapter.rank, self.inputs);
            let rows = &mut weight[part.columns.start * self.inputs..part.columns.end * self.inputs];
            matmul(Precision::F32, b, a, MatrixMut::new(rows, outputs, self.inputs), Onto::Held);
        }
    }
}

/// Packs `right` into `slot`, reusing its storage where the precision is the same.
pub(super) fn pack(slot: &mut Option<PackedMatrix>, precision: Precision, right: Matrix<'_>) {
    let fits = slot.as_ref().is_some_and(|packed| packed.precision() == precision);
    if !fits {
        *slot = Some(PackedMatrix::new(precision, right.rows(), right.cols()));
    }
    if let Some(packed) = slot {
        packed.pack(0, right);
    }
}

/// Rounds `right` into `slot`, reusing its storage where the precision is the same.
pub(super) fn pack_int8(slot: &mut Option<Int8Matrix>, precision: Precision, right: Matrix<'_>) {
    let fits = slot.as_ref().is_some_and(|packed| packed.precision() == precision);
    if !fits {
        *slot = Some(Int8Matrix::new(precision, right.rows(), right.cols()));
    }
    if let Some(packed) = slot {
        packed.pack(right);
    }
}

/// `c = onto + a b` with the copy of `b` that `products` asks for; with the full one packed if it is, which does not change a bit.
pub(super) fn multiply(
    products: Products<'_>,
    packed: &Option<PackedMatrix>,
    int8: &Option<Int8Matrix>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: MatrixMut<'_>,
    onto: Onto<'_>,
) {
    match (products.format, packed) {
        (WeightFormat::Int8, _) => prepared(int8).matmul(a, c, onto),
        (WeightFormat::Full, Some(packed)) => packed.matmul(a, c, onto),
        (WeightFormat::Full, None) => matmul(products.precision, a, b, c, onto),
    }
}

/// Packed weights that have no other form. `Decoder::ready` has checked that they are there.
pub(super) fn prepared<T>(packed: &Option<T>) -> &T {
    packed.as_ref().expect("Decoder::ready has checked that the weights are packed")
}
