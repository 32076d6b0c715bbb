//! Escapes text from outside in messages and log lines.

use std::fmt;

/// A text from outside (a name, an owner, a server's message) as a part of one line of a log or a
/// message. Characters that could begin another line, or hide or rearrange text, are shown by their
/// escapes, as in Rust source code.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Escaped<'a> {
    text: &'a str,
    /// Whether a backslash is escaped as well, so that no two texts look the same.
    is_exact: bool,
}

/// For a name or an owner.
pub(crate) fn escaped(text: &str) -> Escaped<'_> {
    Escaped { text, is_exact: true }
}

/// For sentences.
pub(crate) fn in_one_line(text: &str) -> Escaped<'_> {
    Escaped { text, is_exact: false }
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_odd = |character: char| match character {
            '\\' => self.is_exact,
            // Characters without width, line separators, and characters that change the text
            // direction.
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' => true,
            character => character.is_control(),
        };
        let mut rest = self.text;
        while let Some((before, odd)) = rest.char_indices().find(|(_, character)| is_odd(*character)) {
            formatter.write_str(&rest[..before])?;
            odd.escape_default().fmt(formatter)?;
            rest = &rest[before + odd.len_utf8()..];
        }
        formatter.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_could_forge_a_line_are_escaped() {
        let shown = |text| escaped(text).to_string();
        assert_eq!(shown("order:7 'é' 🔒"), "order:7 'é' 🔒");
        assert_eq!(shown("a\nb\r\x1b[2Kc\u{85}d"), r"a\nb\r\u{1b}[2Kc\u{85}d");
        assert_eq!(shown("a\u{2028}b\u{202e}c\u{200b}"), r"a\u{2028}b\u{202e}c\u{200b}");
        // No two names look the same.
        assert_eq!(shown(r"a\nb"), r"a\\nb");
        assert_eq!(in_one_line("C:\\a\nb").to_string(), r"C:\a\nb");
    }
}
