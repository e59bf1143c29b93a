//! Logs: what goes to stderr, and how it looks.

use std::io::IsTerminal;

use serde::Deserialize;
use tracing_subscriber::EnvFilter;

/// Overrides the level, in the syntax of `tracing_subscriber::EnvFilter`: `info,holdfast_server=debug`.
pub const LOG_VARIABLE: &str = "HOLDFAST_LOG";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("{LOG_VARIABLE}={value:?} is no log filter")]
    Filter { value: String, source: tracing_subscriber::filter::ParseError },
    #[error("logging is set up already")]
    Twice,
}

/// Sends the process's logs to stderr. Once, before anything logs.
pub fn init(level: LogLevel, format: LogFormat) -> Result<(), TelemetryError> {
    let builder = tracing_subscriber::fmt().with_env_filter(filter(level)?).with_writer(std::io::stderr);
    let result = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    result.map_err(|_| TelemetryError::Twice)
}

fn filter(level: LogLevel) -> Result<EnvFilter, TelemetryError> {
    match std::env::var(LOG_VARIABLE) {
        Ok(value) if !value.is_empty() => {
            EnvFilter::try_new(&value).map_err(|source| TelemetryError::Filter { value, source })
        }
        _ => Ok(EnvFilter::new(default_filter(level))),
    }
}

/// The libraries below us say little of use: their debug lines would drown ours.
fn default_filter(level: LogLevel) -> String {
    let level = level.as_str();
    format!("{level},quinn=warn,quinn_proto=warn,quinn_udp=warn,rustls=warn,fuser=warn")
}
