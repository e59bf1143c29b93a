//! What went wrong, as the one sentence that a person reads.

use std::{error::Error, fmt};

/// A sentence for standard error. What caused it follows after a colon.
#[derive(Debug, PartialEq, Eq)]
pub struct CliError(String);

impl CliError {
    pub fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }

    /// What this was part of, then what happened.
    #[must_use]
    pub fn during(self, what: impl fmt::Display) -> Self {
        Self(format!("{what}: {}", self.0))
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Any error with its causes. (`CliError` is none itself, so that this can be.)
impl<E: Error> From<E> for CliError {
    fn from(error: E) -> Self {
        let mut sentence = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some libraries repeat their cause in their own words.
            if !sentence.contains(&text) {
                sentence = format!("{sentence}: {text}");
            }
            cause = error.source();
        }
        Self(sentence.replace('\n', " "))
    }
}

pub type CliResult<T = ()> = Result<T, CliError>;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the file x cannot be read")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_follow_in_one_line_and_are_not_repeated() {
        let outer = Outer(std::io::Error::other("the disk\nis gone"));
        assert_eq!(CliError::from(outer).to_string(), "the file x cannot be read: the disk is gone");
        let twice = std::io::Error::other(std::io::Error::other("once"));
        assert_eq!(CliError::from(twice).during("while testing").to_string(), "while testing: once");
    }
}
