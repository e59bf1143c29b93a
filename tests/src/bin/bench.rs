//! What `scripts/bench` runs: measures one subject, or makes a table and a plot of what was measured.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use holdfast_tests::bench::{Bench, Report, Sample, Sizes, Subject, document, faults, grow, insert, parts, reach};

const USAGE: &str = "bench run SCRIPT WORKLOADS full|quick ARCHIVE SAMPLES | bench report SAMPLES DOCUMENT PLOT | bench grow FILES DOCUMENT | bench reach DOCUMENT | bench faults MEBIBYTES DOCUMENT | bench parts CRITERION DOCUMENT | bench client create|stat|read DIRECTORY FILES SEED";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["run", script, workloads, sizes, archive, samples] => {
            run(Subject::new(script.into()), workloads, sizes == "quick", archive.into(), Path::new(samples))
        }
        ["grow", files, document] => how_it_grows(files, Path::new(document)),
        ["reach", document] => how_far_it_reaches(Path::new(document)),
        ["faults", data_mib, document] => how_it_heals(data_mib, Path::new(document)),
        ["parts", criterion, document] => what_parts_cost(Path::new(criterion), Path::new(document)),
        ["client", act, directory, files, seed] => client(act, directory, files, seed),
        ["report", samples, document, plot] => report(Path::new(samples), Path::new(document), Path::new(plot)),
        _ => Err(anyhow::anyhow!(USAGE)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(subject: Subject, workloads: &str, quick: bool, archive: PathBuf, samples: &Path) -> Result<()> {
    let sizes = if quick { Sizes::QUICK } else { Sizes::FULL };
    let measured = Bench::new(subject, sizes, archive)?.run(workloads);
    let mut file = OpenOptions::new().create(true).append(true).open(samples)?;
    for sample in &measured {
        writeln!(file, "{}", serde_json::to_string(sample)?)?;
    }
    match measured.iter().filter(|sample| sample.value.is_none()).count() {
        0 => Ok(()),
        failed => bail!("{failed} figures could not be taken"),
    }
}

fn report(samples: &Path, document: &Path, plot: &Path) -> Result<()> {
    let text = fs::read_to_string(samples).with_context(|| format!("read {}", samples.display()))?;
    let samples: Vec<Sample> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let report = Report::new(&samples);
    let table = report.table(&conditions());
    std::io::stdout().write_all(table.as_bytes())?;
    fs::write(plot, report.plot()).with_context(|| format!("write {}", plot.display()))?;
    write_into(document, "scripts/bench", &table)
}

/// In steps of ten, up to so many files.
fn how_it_grows(files: &str, document: &Path) -> Result<()> {
    let files: u64 = files.parse().context("a number of files")?;
    let steps: Vec<u64> =
        (4..).map(|power| 10_u64.pow(power)).take_while(|step| *step < files).chain([files]).collect();
    let table = grow::table(&grow::run(&steps)?);
    std::io::stdout().write_all(table.as_bytes())?;
    write_into(document, "scripts/bench --grow", &table)
}

fn how_far_it_reaches(document: &Path) -> Result<()> {
    let table = reach::run()?;
    std::io::stdout().write_all(table.as_bytes())?;
    write_into(document, "scripts/bench --reach", &table)
}

fn how_it_heals(data_mib: &str, document: &Path) -> Result<()> {
    let table = faults::run(data_mib.parse().context("a number of mebibytes")?)?;
    std::io::stdout().write_all(table.as_bytes())?;
    write_into(document, "scripts/bench --faults", &table)
}

fn what_parts_cost(criterion: &Path, document: &Path) -> Result<()> {
    let table = parts::table(criterion)?;
    std::io::stdout().write_all(table.as_bytes())?;
    write_into(document, "scripts/bench --parts", &table)
}

fn client(act: &str, directory: &str, files: &str, seed: &str) -> Result<()> {
    let files = files.parse().context("a number of files")?;
    reach::client(act, directory.into(), files, seed.parse().context("a seed")?)
}

/// In the place that the document has for it, or at its end.
fn write_into(path: &Path, command: &str, part: &str) -> Result<()> {
    let part = match part.starts_with('|') {
        true => format!("{}\n\n{part}", conditions().trim_end()),
        false => part.to_owned(),
    };
    let text = match fs::read_to_string(path) {
        Ok(text) => insert(&text, command, &part).unwrap_or_else(|| text + &document(command, &part)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => document(command, &part),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Where and of what this is measured, as a sentence with a space at its end.
fn conditions() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let memory = read("/proc/meminfo").split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
    let gib = (memory + (1 << 19)) >> 20;
    let kernel = read("/proc/sys/kernel/osrelease");
    let commit = std::env::var("BENCH_COMMIT").map_or(String::new(), |commit| format!("Build {commit}; "));
    format!("{commit}{cores} cores, {gib} GiB of memory, Linux {}. ", kernel.split('-').next().unwrap_or("").trim())
}
