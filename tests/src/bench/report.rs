//! A table and a plot of many samples. Pure.

use std::{collections::BTreeMap, fmt::Write};

use super::{Sample, Unit};

/// Whom the others are compared with.
const OURS: &str = "holdfast";
/// Shown beside the others, with one copy and without a network: nobody has to beat them.
const BASELINES: [&str; 2] = ["local", "passthrough"];

/// The medians of what was measured.
#[derive(Debug)]
pub struct Report {
    labels: Vec<String>,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    metric: String,
    unit: Unit,
    medians: BTreeMap<String, f64>,
    /// Rounds, and from the smallest to the largest of ours in percent of the median.
    rounds: usize,
    spread: f64,
    /// The best of those who have to be beaten.
    best: Option<f64>,
}

fn is_peer(label: &str) -> bool {
    label != OURS && !BASELINES.contains(&label)
}

impl Report {
    /// Of all samples that have a value, in the order in which metrics and subjects appear.
    pub fn new(samples: &[Sample]) -> Self {
        let mut labels: Vec<String> = Vec::new();
        let mut metrics: Vec<(String, Unit)> = Vec::new();
        let mut values: BTreeMap<(String, String), Vec<f64>> = BTreeMap::new();
        for sample in samples {
            let Some(value) = sample.value else { continue };
            if !labels.contains(&sample.label) {
                labels.push(sample.label.clone());
            }
            if !metrics.iter().any(|(metric, _)| *metric == sample.metric) {
                metrics.push((sample.metric.clone(), sample.unit));
            }
            values.entry((sample.metric.clone(), sample.label.clone())).or_default().push(value);
        }
        labels.sort_by_key(|label| (label != OURS, BASELINES.contains(&label.as_str())));
        metrics.sort_by_key(|(metric, _)| metric.chars().next());
        let rows = metrics.into_iter().map(|(metric, unit)| {
            let of =
                |label: &String| Some((label.clone(), median(values.get(&(metric.clone(), label.clone()))?.clone())));
            let medians: BTreeMap<String, f64> = labels.iter().filter_map(of).collect();
            let peers = medians.iter().filter(|(label, _)| is_peer(label)).map(|(_, value)| *value);
            let best = peers.reduce(|a, b| if unit.ratio(a, b) > 1.0 { a } else { b });
            let ours = values.get(&(metric.clone(), OURS.to_owned())).cloned().unwrap_or_default();
            Row { metric, unit, medians, rounds: ours.len(), spread: spread(&ours), best }
        });
        Self { rows: rows.collect(), labels }
    }

    /// Markdown: under which conditions, and the figures. In brackets how many times as good as the best peer.
    pub fn table(&self, conditions: &str) -> String {
        let rounds = self.rows.iter().map(|row| row.rounds).max().unwrap_or(0);
        let mut table = format!(
            "{conditions}{rounds} rounds, medians; spread: of Holdfast's figures, from the smallest to the largest in percent of the median.\n\n\
             | | unit | {} | spread |\n|---|---|{}---:|\n",
            self.labels.join(" | "),
            "---:|".repeat(self.labels.len())
        );
        for row in &self.rows {
            let cells: Vec<String> = self.labels.iter().map(|label| row.cell(label)).collect();
            let (metric, unit, spread) = (&row.metric, row.unit.name(), row.spread);
            writeln!(table, "| {metric} | {unit} | {} | {spread:.0} % |", cells.join(" | "))
                .expect("a string takes all");
        }
        table
    }

    /// SVG: a line for each metric, a dot for each subject, further right the better; the best peer is at 1.
    pub fn plot(&self) -> String {
        let height = LINE * (self.rows.len() + 3);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
        );
        let mut draw = |element: String| writeln!(svg, "{element}").expect("a string takes all");
        for (at, label) in self.labels.iter().enumerate() {
            let x = LEFT + at * 110;
            draw(format!("<circle cx=\"{x}\" cy=\"{}\" r=\"5\" fill=\"{}\"/>", LINE - 4, color(at)));
            draw(format!("<text x=\"{}\" y=\"{LINE}\">{label}</text>", x + 10));
        }
        let bottom = height - LINE;
        for exponent in -3..=3 {
            let x = place(f64::exp2(f64::from(exponent)));
            let width = if exponent == 0 { 2 } else { 1 };
            draw(format!(
                "<line x1=\"{x:.0}\" x2=\"{x:.0}\" y1=\"{}\" y2=\"{bottom}\" stroke=\"#bbb\" stroke-width=\"{width}\"/>",
                LINE * 3 / 2
            ));
            draw(format!(
                "<text x=\"{x:.0}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                bottom + 14,
                f64::exp2(f64::from(exponent))
            ));
        }
        for (at, row) in self.rows.iter().enumerate() {
            let y = LINE * (at + 2) + LINE / 2;
            draw(format!("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>", LEFT - 30, y + 4, row.metric));
            for (at, label) in self.labels.iter().enumerate().rev() {
                let Some(ratio) = row.ratio(label) else { continue };
                draw(format!(
                    "<circle cx=\"{:.1}\" cy=\"{y}\" r=\"5\" fill=\"{}\"><title>{label}: {ratio:.2}</title></circle>",
                    place(ratio),
                    color(at)
                ));
            }
        }
        svg + "</svg>\n"
    }
}

const WIDTH: usize = 1000;
const LEFT: usize = 300;
const LINE: usize = 22;

/// Logarithmic, from an eighth to eight times; what lies outside is at the edge.
fn place(ratio: f64) -> f64 {
    let middle = (WIDTH + LEFT) as f64 / 2.0;
    middle + ratio.log2().clamp(-3.2, 3.2) * (WIDTH - LEFT) as f64 / 7.0
}

fn color(at: usize) -> &'static str {
    ["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#999999", "#cccccc"][at % 6]
}

impl Row {
    fn ratio(&self, label: &str) -> Option<f64> {
        Some(self.unit.ratio(*self.medians.get(label)?, self.best?))
    }

    fn cell(&self, label: &str) -> String {
        let Some(value) = self.medians.get(label) else { return String::new() };
        let mut cell = figure(*value);
        if let Some(ratio) = self.ratio(label) {
            let ratio = if ratio < 99.5 { format!("{ratio:.2}") } else { format!("{ratio:.0}") };
            write!(cell, " ({ratio})").expect("a string takes all");
        }
        if is_peer(label) && Some(*value) == self.best { format!("**{cell}**") } else { cell }
    }
}

/// Three places at least, thousands apart.
fn figure(value: f64) -> String {
    match value {
        _ if value < 10.0 => format!("{value:.2}"),
        _ if value < 100.0 => format!("{value:.1}"),
        _ => {
            let digits = format!("{value:.0}");
            let grouped: Vec<&str> =
                digits.as_bytes().rchunks(3).rev().map(|part| std::str::from_utf8(part).unwrap_or("")).collect();
            grouped.join(",")
        }
    }
}

/// From the smallest to the largest, in percent of the median.
fn spread(values: &[f64]) -> f64 {
    let (least, most) =
        values.iter().fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(*value), most.max(*value)));
    if values.is_empty() { 0.0 } else { (most - least) * 100.0 / median(values.to_vec()) }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { f64::midpoint(values[middle - 1], values[middle]) } else { values[middle] }
}

/// A document that has nothing but `part`, and a place for the next that `command` makes.
pub fn document(command: &str, part: &str) -> String {
    format!("<!-- what follows is made by {command} -->\n{part}<!-- made by {command} until here -->\n")
}

/// `document` with `part` in the place that is kept for what `command` makes; `None`: it has no such place.
pub fn insert(document: &str, command: &str, part: &str) -> Option<String> {
    let first = format!("<!-- what follows is made by {command} -->\n");
    let begin = document.find(&first)? + first.len();
    let end = begin + document[begin..].find(&format!("<!-- made by {command} until here -->\n"))?;
    Some(format!("{}{part}{}", &document[..begin], &document[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(label: &str, metric: &str, unit: Unit, value: f64) -> Sample {
        Sample { label: label.into(), metric: metric.into(), unit, value: Some(value), error: None }
    }

    fn report() -> Report {
        Report::new(&[
            sample("local", "a write", Unit::MegabytesPerSecond, 12_345.6),
            sample("holdfast", "a write", Unit::MegabytesPerSecond, 300.0),
            sample("holdfast", "a write", Unit::MegabytesPerSecond, 500.0),
            sample("one", "a write", Unit::MegabytesPerSecond, 200.0),
            sample("two", "a write", Unit::MegabytesPerSecond, 100.0),
            sample("holdfast", "f rm", Unit::Seconds, 2.0),
            sample("one", "f rm", Unit::Seconds, 4.0),
            sample("two", "f rm", Unit::Seconds, 3.0),
            Sample { value: None, ..sample("two", "g db", Unit::PerSecond, 0.0) },
        ])
    }

    #[test]
    fn the_table_compares_medians_with_the_best_peer() {
        let expected = "Here. 2 rounds, medians; spread: of Holdfast's figures, from the smallest to the largest in percent of the median.\n\n\
            | | unit | holdfast | one | two | local | spread |\n|---|---|---:|---:|---:|---:|---:|\n\
            | a write | MB/s | 400 (2.00) | **200 (1.00)** | 100 (0.50) | 12,346 (61.73) | 50 % |\n\
            | f rm | s | 2.00 (1.50) | 4.00 (0.75) | **3.00 (1.00)** |  | 0 % |\n";
        assert_eq!(report().table("Here. "), expected);
    }

    #[test]
    fn the_plot_has_a_dot_for_each_figure_and_each_subject() {
        let plot = report().plot();
        assert_eq!(plot.matches("<title>").count(), 7);
        assert_eq!(plot.matches("<circle").count(), 7 + 4);
        assert!(plot.ends_with("</svg>\n") && place(1.0) < place(2.0) && place(1e9) < WIDTH as f64);
    }

    #[test]
    fn a_part_takes_its_own_place_only() {
        let place = |part: &str| {
            format!(
                "before\n<!-- what follows is made by scripts/bench -->\n{part}<!-- made by scripts/bench until here -->\nafter\n"
            )
        };
        let document = place("old\n");
        assert_eq!(insert(&document, "scripts/bench", "new\n").unwrap(), place("new\n"));
        assert_eq!(insert("nothing", "scripts/bench", "new"), None);
        assert_eq!(insert(&document, "scripts/other", "new"), None);
    }
}
