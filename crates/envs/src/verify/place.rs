//! Where in a completion the answer stands.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where in a completion the answer stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Anywhere: the whole completion is the answer.
    #[default]
    Text,
    /// Inside the last `<TAG>...</TAG>`.
    Tag,
    /// Inside the last `\boxed{...}`.
    Boxed,
}

impl Place {
    /// The answer's text, or `None` when the completion has no such place. `tag` matters for [`Place::Tag`] only.
    pub fn find<'a>(self, completion: &'a str, tag: &str) -> Option<&'a str> {
        match self {
            Self::Text => Some(completion),
            Self::Tag => last_tag(completion, tag),
            Self::Boxed => last_boxed(completion),
        }
    }
}

/// The content of the last complete `<tag>...</tag>`.
fn last_tag<'a>(text: &'a str, tag: &str) -> Option<&'a str> {
    let close = text.rfind(&format!("</{tag}>"))?;
    let open = format!("<{tag}>");
    let start = text[..close].rfind(&open)? + open.len();
    Some(&text[start..close])
}

/// The content of the last `\boxed{...}`, whose braces balance.
fn last_boxed(text: &str) -> Option<&str> {
    const OPEN: &str = r"\boxed{";
    let start = text.rfind(OPEN)? + OPEN.len();
    let mut depth = 1u32;
    for (offset, byte) in text[start..].bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&text[start..start + offset]);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_last_complete_place() {
        let tag = |text| Place::Tag.find(text, "answer");
        assert_eq!(tag("<answer>1</answer> or <answer>2</answer>"), Some("2"));
        assert_eq!(tag("<answer><answer>3</answer>"), Some("3"));
        assert_eq!(tag("<answer>4"), None);
        assert_eq!(tag("4</answer>"), None);
        assert_eq!(tag("</answer><answer>"), None);
        let boxed = |text| Place::Boxed.find(text, "");
        assert_eq!(boxed(r"so \boxed{1} no, \boxed{\frac{1}{2}}."), Some(r"\frac{1}{2}"));
        assert_eq!(boxed(r"\boxed{\frac{1}{2}"), None);
        assert_eq!(boxed("7"), None);
        assert_eq!(Place::Text.find(" 7 ", ""), Some(" 7 "));
    }
}
