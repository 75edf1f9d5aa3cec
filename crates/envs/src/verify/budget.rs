//! Step budgets: bounds on work that, unlike deadlines, give the same verdict on every machine.

/// Steps left to a verifier. A step is a byte read, a node parsed or an arithmetic operation.
#[derive(Debug)]
pub struct Budget {
    left: u64,
}

/// The budget is spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the step budget is spent")]
pub struct Exhausted;

impl Budget {
    /// A budget of `steps`.
    pub fn new(steps: u64) -> Self {
        Self { left: steps }
    }

    /// Takes `steps` away.
    ///
    /// # Errors
    /// [`Exhausted`] when fewer are left.
    pub fn spend(&mut self, steps: u64) -> Result<(), Exhausted> {
        self.left = self.left.checked_sub(steps).ok_or(Exhausted)?;
        Ok(())
    }

    /// Takes a step for every byte of `text`, before it is read.
    ///
    /// # Errors
    /// [`Exhausted`] when fewer are left.
    pub fn spend_on(&mut self, text: &str) -> Result<(), Exhausted> {
        self.spend(text.len() as u64)
    }
}
