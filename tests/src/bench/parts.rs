//! A table of what `cargo bench` has measured.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// Of criterion's benchmark.json.
#[derive(Deserialize)]
struct Named {
    group_id: String,
    function_id: String,
    throughput: Option<Throughput>,
}

#[derive(Deserialize)]
enum Throughput {
    Bytes(u64),
    Elements(u64),
}

/// Of its estimates.json, in nanoseconds.
#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
    confidence_interval: Interval,
}

#[derive(Deserialize)]
struct Interval {
    lower_bound: f64,
    upper_bound: f64,
}

/// Markdown: a line for each benchmark below `criterion`, criterion's directory.
pub fn table(criterion: &Path) -> Result<String> {
    let mut lines = Vec::new();
    for group in entries(criterion)? {
        for new in entries(&group)?.into_iter().map(|function| function.join("new")).filter(|new| new.is_dir()) {
            let estimates: Estimates = read(&new.join("estimates.json"))?;
            lines.push(line(&read(&new.join("benchmark.json"))?, &estimates.median));
        }
    }
    ensure!(!lines.is_empty(), "{} has no benchmarks", criterion.display());
    let head = "| part | takes, us, median (with 95 % confidence) | |\n|---|---:|---:|\n";
    Ok(head.to_owned() + &lines.concat())
}

/// Those that are directories, by name.
fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.is_dir());
    paths.sort();
    Ok(paths)
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("understand {}", path.display()))
}

fn line(named: &Named, median: &Estimate) -> String {
    let seconds = median.point_estimate / 1e9;
    let rate = match named.throughput {
        Some(Throughput::Bytes(bytes)) if bytes >= 1 << 20 => {
            format!("{:.2} GiB/s", bytes as f64 / seconds / f64::from(1 << 30))
        }
        Some(Throughput::Elements(elements)) => format!("{:.0}/s", elements as f64 / seconds),
        Some(Throughput::Bytes(_)) | None => String::new(),
    };
    let us = |nanoseconds: f64| figure(nanoseconds / 1e3);
    let Interval { lower_bound, upper_bound } = median.confidence_interval;
    let takes = format!("{} ({}-{})", us(median.point_estimate), us(lower_bound), us(upper_bound));
    format!("| {}: {} | {takes} | {rate} |\n", named.group_id, named.function_id)
}

/// With three digits that say something.
fn figure(value: f64) -> String {
    match value {
        ..1.0 => format!("{value:.3}"),
        ..10.0 => format!("{value:.2}"),
        ..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_benchmark_has_a_line_with_its_rate() {
        let directory = tempfile::tempdir().unwrap();
        let add = |name: &str, benchmark: &str, nanoseconds: f64| {
            let new = directory.path().join(name).join("new");
            fs::create_dir_all(&new).unwrap();
            fs::write(new.join("benchmark.json"), benchmark).unwrap();
            let estimate = format!(
                r#"{{"median":{{"point_estimate":{nanoseconds},"confidence_interval":{{"confidence_level":0.95,"lower_bound":{},"upper_bound":{}}},"standard_error":1.0}}}}"#,
                nanoseconds * 0.9,
                nanoseconds * 1.1
            );
            fs::write(new.join("estimates.json"), estimate).unwrap();
        };
        assert!(table(directory.path()).is_err(), "nothing was measured");
        add(
            "hash/1048576 bytes",
            r#"{"group_id":"hash","function_id":"1048576 bytes","throughput":{"Bytes":1048576}}"#,
            125_000.0,
        );
        add(
            "apply/100 new files",
            r#"{"group_id":"apply","function_id":"100 new files","throughput":{"Elements":100}}"#,
            500_000.0,
        );
        add("codec/encode", r#"{"group_id":"codec","function_id":"encode","throughput":null}"#, 150.0);
        let table = table(directory.path()).unwrap();
        let lines: Vec<&str> = table.lines().skip(2).collect();
        let expected = [
            "| apply: 100 new files | 500 (450-550) | 200000/s |",
            "| codec: encode | 0.150 (0.135-0.165) |  |",
            "| hash: 1048576 bytes | 125 (112-138) | 7.81 GiB/s |",
        ];
        assert_eq!(lines, expected);
    }
}
