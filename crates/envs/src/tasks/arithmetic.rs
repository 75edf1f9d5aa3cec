//! Bare arithmetic: `What is 27 plus 8?`

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::expression::{Sum, Term};
use super::{Draws, Problem, Task, TaskError};

/// An operation between two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// `a + b`
    Add,
    /// `a - b`, never negative.
    Subtract,
    /// `a * b`
    Multiply,
    /// `a / b`, always whole.
    Divide,
}

/// Options of the `arithmetic` task. Every choice is uniform.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ArithmeticOptions {
    /// Operations to choose from: `add`, `subtract`, `multiply`, `divide`. Division is for two operands only.
    pub operations: Vec<Operation>,
    /// Operands of a problem. With more than two, the operations are chosen anew for each and have their usual precedence.
    pub operands: usize,
    /// Smallest and largest first operand of a sum or difference.
    pub first: [i64; 2],
    /// Smallest and largest value of its other operands. A difference exchanges its two operands where it would be negative.
    pub others: [i64; 2],
    /// Smallest and largest factor of a product, divisor and quotient.
    pub factors: [i64; 2],
    /// Content of the user message, one chosen for each problem. `{expression}` stands for the arithmetic in signs
    /// (`12 * 3`), `{words}` for the same in words (`12 times 3`).
    pub phrasings: Vec<String>,
    /// Content of the system message; without one, the chat template's default holds.
    pub system: Option<String>,
}

impl Default for ArithmeticOptions {
    fn default() -> Self {
        Self {
            operations: vec![Operation::Add, Operation::Multiply],
            operands: 2,
            first: [1, 50],
            others: [1, 50],
            factors: [2, 15],
            phrasings: vec!["What is {words}?".into(), "What is {words}? Reply with only the number.".into()],
            system: None,
        }
    }
}

/// See [`ArithmeticOptions`].
pub struct Arithmetic {
    options: ArithmeticOptions,
}

impl Arithmetic {
    /// The task with these options.
    ///
    /// # Errors
    /// An empty list, an empty or too wide range, a phrasing without the arithmetic, a division of more than two operands.
    pub fn new(options: ArithmeticOptions) -> Result<Self, TaskError> {
        let refuse = |reason: String| Err(TaskError { task: "arithmetic", reason });
        if options.operations.is_empty() {
            return refuse("operations is empty".into());
        }
        if !(2..=8).contains(&options.operands) {
            return refuse(format!("operands is {}, expected 2 to 8", options.operands));
        }
        if options.operands > 2 && options.operations.contains(&Operation::Divide) {
            return refuse(format!("operations holds divide, which needs operands = 2, found {}", options.operands));
        }
        for (name, [low, high], limit) in [
            ("first", options.first, 1_000_000_000),
            ("others", options.others, 1_000_000_000),
            // The product of eight factors must fit 64 bits.
            ("factors", options.factors, if options.operands == 2 { 1_000_000_000 } else { 100 }),
        ] {
            let least = if name == "factors" { 1 } else { 0 };
            if !(least <= low && low <= high && high <= limit) {
                return refuse(format!("{name} is [{low}, {high}], expected {least} <= low <= high <= {limit}"));
            }
        }
        if options.phrasings.is_empty() {
            return refuse("phrasings is empty".into());
        }
        if let Some(phrasing) = options
            .phrasings
            .iter()
            .find(|phrasing| !phrasing.contains("{expression}") && !phrasing.contains("{words}"))
        {
            return refuse(format!("phrasings holds {phrasing:?}, which has neither {{expression}} nor {{words}}"));
        }
        Ok(Self { options })
    }

    fn two_operands(&self, operation: Operation, draws: &mut Draws) -> Sum {
        let ArithmeticOptions { first, others, factors, .. } = self.options;
        let [first, others, factors] =
            [first, others, factors].map(|[low, high]| move |draws: &mut Draws| draws.between(low, high));
        match operation {
            Operation::Add => Sum::addition(first(draws), others(draws)),
            Operation::Subtract => {
                let (a, b) = (first(draws), others(draws));
                Sum::subtraction(a.max(b), a.min(b))
            }
            Operation::Multiply => Sum::multiplication(factors(draws), factors(draws)),
            Operation::Divide => {
                let (quotient, divisor) = (factors(draws), factors(draws));
                Sum::division(quotient * divisor, divisor)
            }
        }
    }

    /// A chain of operations with the usual precedence; `None` if its value is negative.
    fn chain(&self, draws: &mut Draws) -> Option<Sum> {
        let options = &self.options;
        let operations: Vec<Operation> = (1..options.operands).map(|_| *draws.pick(&options.operations)).collect();
        let mut terms: Vec<Term> = Vec::new();
        for index in 0..options.operands {
            let before = index.checked_sub(1).map(|before| operations[before]);
            let factor = before == Some(Operation::Multiply) || operations.get(index) == Some(&Operation::Multiply);
            let [low, high] = match (factor, index) {
                (true, _) => options.factors,
                (false, 0) => options.first,
                (false, _) => options.others,
            };
            let value = draws.between(low, high);
            match (before, terms.last_mut()) {
                (Some(Operation::Multiply), Some(term)) => term.factors.push(value),
                (Some(Operation::Subtract), _) => terms.push(Term::number(value).subtracted()),
                _ => terms.push(Term::number(value)),
            }
        }
        Some(Sum(terms)).filter(|sum| sum.value() >= 0)
    }
}

impl Task for Arithmetic {
    fn name(&self) -> &'static str {
        "arithmetic"
    }

    fn draw(&self, draws: &mut Draws) -> Problem {
        let operation = *draws.pick(&self.options.operations);
        let (sum, kind) = if self.options.operands == 2 {
            let kind = match operation {
                Operation::Add => "addition",
                Operation::Subtract => "subtraction",
                Operation::Multiply => "multiplication",
                Operation::Divide => "division",
            };
            (self.two_operands(operation, draws), kind)
        } else {
            // Some first draw is not negative: at worst all operands are equal and half the terms are added.
            let sum = std::iter::repeat_with(|| self.chain(draws)).take(1000).flatten().next();
            (sum.unwrap_or_else(|| self.two_operands(Operation::Add, draws)), "chain")
        };
        let phrasing = draws.pick(&self.options.phrasings);
        Problem {
            system: self.options.system.clone(),
            question: phrasing.replace("{expression}", &sum.to_string()).replace("{words}", &sum.words()),
            answer: sum.value().to_string(),
            kind,
            key: sum.key(),
        }
    }
}
