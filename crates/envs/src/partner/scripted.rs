//! A partner that follows a script.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Line, Partner, PartnerError, Reply};

/// Options of a scripted partner: the first rule whose text occurs in the last message answers it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ScriptedOptions {
    /// The rules, in order.
    pub rules: Vec<Rule>,
    /// The answer where no rule applies; without it, that is an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otherwise: Option<String>,
}

/// What to say to what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Text that the message must contain.
    pub when: String,
    /// The answer.
    pub say: String,
}

/// See [`ScriptedOptions`].
pub struct Scripted {
    options: ScriptedOptions,
}

impl Scripted {
    /// The partner with this script.
    pub fn new(options: ScriptedOptions) -> Self {
        Self { options }
    }
}

impl Partner for Scripted {
    fn reply(&self, lines: &[Line]) -> Result<Reply, PartnerError> {
        let last = lines.last().map_or("", |line| line.content.as_str());
        let rule = self.options.rules.iter().find(|rule| last.contains(&rule.when)).map(|rule| &rule.say);
        let text = rule
            .or(self.options.otherwise.as_ref())
            .ok_or_else(|| PartnerError::NoRule(crate::reward::shorten(last)))?;
        Ok(Reply { text: text.clone(), ..Reply::default() })
    }
}
