//! Programs that the comparison runs, each within a limit.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// No step takes longer.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// Runs `script` with bash in `directory`: how long it took, and what it said.
pub(super) fn run(directory: &Path, script: &str) -> Result<(Duration, String)> {
    let began = Instant::now();
    let mut command = Command::new("timeout");
    command.arg(STEP_LIMIT.as_secs().to_string()).args(["bash", "-euo", "pipefail", "-c", script]);
    let output = command.current_dir(directory).output().with_context(|| format!("start {script}"))?;
    let took = began.elapsed();
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or("it said nothing").to_owned();
        bail!("{}: {last}", if output.status.code() == Some(124) { "too slow" } else { "failed" });
    }
    Ok((took, String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// What fio measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct FioFigures {
    pub(super) bytes_per_second: f64,
    pub(super) operations_per_second: f64,
    pub(super) operations: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

/// Runs one job of fio on `file`; `direction` is `read` or `write`.
pub(super) fn fio(directory: &Path, file: &str, direction: &str, arguments: &str) -> Result<FioFigures> {
    let script = format!(
        "fio --name=job --ioengine=psync --fallocate=none --invalidate=0 --randrepeat=0 --refill_buffers=1 \
         --output-format=json --group_reporting --filename={file} {arguments}"
    );
    let (_, said) = run(directory, &script)?;
    let json = said.find('{').map_or("", |at| &said[at..]);
    let parsed: serde_json::Value = serde_json::from_str(json).context("what fio says")?;
    let job = &parsed["jobs"][0][direction];
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or_default();
    let percentile = |name: &str| number(&job["clat_ns"]["percentile"][name]) / 1000.0;
    Ok(FioFigures {
        bytes_per_second: number(&job["bw_bytes"]),
        operations_per_second: number(&job["iops"]),
        operations: number(&job["total_ios"]),
        p50_us: percentile("50.000000"),
        p99_us: percentile("99.000000"),
    })
}
