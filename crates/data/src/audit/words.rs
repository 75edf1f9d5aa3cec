//! Text as words that can be compared: in lower case, spacing gone, every other sign a word of its own.
//!
//! `3 + 4` and `3 - 4` must differ, so signs count; scripts without spaces are compared character by character.

/// The words of a text, as hashes.
pub(super) fn words(text: &str) -> Vec<u64> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut end = |word: &mut String| {
        if !word.is_empty() {
            words.push(hash(word.bytes().map(u64::from)));
            word.clear();
        }
    };
    for character in text.chars().flat_map(char::to_lowercase) {
        let alone = !character.is_alphanumeric() || is_ideographic(character);
        if alone {
            end(&mut word);
        }
        if !character.is_whitespace() {
            word.push(character);
        }
        if alone {
            end(&mut word);
        }
    }
    end(&mut word);
    words
}

/// Scripts that put no spaces between words: kana, Han and what lies between and around them.
fn is_ideographic(character: char) -> bool {
    matches!(character, '\u{2e80}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

/// The hashes of every `n` words in a row, in order.
pub(super) fn n_grams(words: &[u64], n: usize) -> impl Iterator<Item = u64> {
    words.windows(n).map(|window| hash(window.iter().copied()))
}

/// FNV-1a over words of 64 bits, its bits then mixed.
pub(super) fn hash(values: impl Iterator<Item = u64>) -> u64 {
    mix(values.fold(0xcbf2_9ce4_8422_2325, |hash: u64, value| (hash ^ value).wrapping_mul(0x0100_0000_01b3)))
}

/// The finaliser of SplitMix64: every bit of the result depends on every bit of `x`.
pub(super) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_spacing_do_not_matter_and_signs_do() {
        assert_eq!(words("What is 3 + 4?"), words(" what  IS 3+4 ?\n"));
        assert_ne!(words("3 + 4"), words("3 - 4"));
        assert_ne!(words("34"), words("3 4"));
        assert_eq!(words("三加四").len(), 3);
        assert!(words(" \n").is_empty());
    }

    #[test]
    fn n_grams_are_overlapping_windows() {
        let text = words("a b c d");
        assert_eq!(n_grams(&text, 3).count(), 2);
        assert_eq!(n_grams(&text, 5).count(), 0);
        assert_eq!(n_grams(&text, 3).last(), n_grams(&words("b c d"), 3).last());
    }
}
