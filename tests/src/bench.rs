//! The comparison of `scripts/bench`: one workload on any mounted directory, and what is made of its figures.

pub mod faults;
pub mod grow;
pub mod parts;
pub mod reach;
mod report;
mod small;
mod tools;
mod workload;

use serde::{Deserialize, Serialize};

pub use report::{Report, document, insert};
pub use workload::{Bench, Sizes, Subject};

/// One figure, or why it could not be taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Whose.
    pub label: String,
    /// A letter, and a name within it.
    pub metric: String,
    pub unit: Unit,
    pub value: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    #[serde(rename = "MB/s")]
    MegabytesPerSecond,
    #[serde(rename = "1/s")]
    PerSecond,
    #[serde(rename = "us")]
    Microseconds,
    #[serde(rename = "s")]
    Seconds,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Self::MegabytesPerSecond => "MB/s",
            Self::PerSecond => "1/s",
            Self::Microseconds => "us",
            Self::Seconds => "s",
        }
    }

    /// How many times as good `value` is as `other`.
    pub fn ratio(self, value: f64, other: f64) -> f64 {
        match self {
            Self::MegabytesPerSecond | Self::PerSecond => value / other,
            Self::Microseconds | Self::Seconds => other / value,
        }
    }
}
