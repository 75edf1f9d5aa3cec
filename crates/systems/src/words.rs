//! Tokenizers whose tokens are words, for worlds with a closed vocabulary.

use model::tokenizer::Tokenizer;

use crate::error::Result;

/// The tokenizer in which word `i` of the list is token `i`; texts are words with spaces between them, and a word that is not listed is
/// the first. `eos` is the token that ends an answer.
///
/// # Errors
/// A word that is there twice, or is empty.
pub fn tokenizer(words: &[String], bos: u32, eos: u32, pad: u32) -> Result<Tokenizer> {
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), id.into())).collect();
    if vocabulary.len() != words.len() {
        let reason = format!("{} words, {} of them different", words.len(), vocabulary.len());
        return Err(model::Error::Invalid(reason).into());
    }
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": words.first() },
    });
    Ok(Tokenizer::from_json(&json.to_string())?.with_special_ids(Some(bos), Some(eos), Some(pad))?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn words_are_tokens() {
        let words: Vec<String> = ["<pad>", "<bos>", "<eos>", "a", "bee", ","].map(Into::into).into();
        let tokenizer = tokenizer(&words, 1, 2, 0).unwrap();
        assert_eq!(tokenizer.encode("bee , a a").unwrap(), [4, 5, 3, 3]);
        assert_eq!(tokenizer.decode(&[1, 4, 5, 3, 2]), "bee , a");
        assert_eq!((tokenizer.eos(), tokenizer.vocab_size()), (Some(2), 6));
        let twice: Vec<String> = ["x", "x"].map(Into::into).into();
        assert!(super::tokenizer(&twice, 0, 1, 0).is_err());
    }
}
