//! Combines all rounds in a table and in JSON.
//!
//! A ratio is the median of the rounds' ratios. The figures of one round are measured directly
//! after each other.

use std::fmt::Write as _;
use std::fs;

use serde_json::{Value, json};

use crate::goals::{GOALS, Goal};
use crate::options::{Options, PathName};
use crate::workload::{Figure, Workload};

/// All measured figures.
#[derive(Debug)]
pub struct Report {
    paths: Vec<PathName>,
    environment: Value,
    rows: Vec<Row>,
}

/// One figure on all paths, for every round.
#[derive(Debug)]
struct Row {
    workload: String,
    figure: &'static str,
    /// The values of each path, in the order of the paths.
    rounds: Vec<Vec<f64>>,
}

impl Report {
    /// An empty report. It records the state of the machine before any load.
    ///
    /// # Panics
    /// `/proc` cannot be read.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        let line = |path: &str| fs::read_to_string(path).expect("/proc is there").trim().to_owned();
        let load = line("/proc/loadavg");
        let environment = json!({
            "kernel": line("/proc/sys/kernel/osrelease"),
            "processors": std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            "load_before": load.split(' ').next(),
            "seconds": options.seconds,
            "rounds": options.rounds,
            "access_log": options.access_log,
        });
        Self { paths: options.paths.clone(), environment, rows: Vec::new() }
    }

    /// Adds the figures of one workload on one path in one round.
    pub fn add(&mut self, workload: Workload, path: PathName, figures: &[Figure]) {
        let Some(column) = self.paths.iter().position(|known| *known == path) else {
            return;
        };
        for figure in figures {
            let row = self.row(workload.to_string(), figure.name);
            if let (Some(rounds), Some(value)) = (row.rounds.get_mut(column), figure.value) {
                rounds.push(value);
            }
        }
    }

    fn row(&mut self, workload: String, figure: &'static str) -> &mut Row {
        let known =
            self.rows.iter().position(|row| row.workload == workload && row.figure == figure);
        let index = known.unwrap_or(self.rows.len());
        if known.is_none() {
            self.rows.push(Row { workload, figure, rounds: vec![Vec::new(); self.paths.len()] });
        }
        self.rows.get_mut(index).expect("the row exists")
    }

    /// The machine and the options in one line.
    #[must_use]
    pub fn machine(&self) -> String {
        let of = |key: &str| self.environment.get(key).map(ToString::to_string).unwrap_or_default();
        format!(
            "kernel {}, {} CPUs, load average {} before; {} rounds of {} s",
            of("kernel"),
            of("processors"),
            of("load_before"),
            of("rounds"),
            of("seconds")
        )
        .replace('"', "")
    }

    /// The table in Markdown: medians with minimum and maximum of all rounds, and the ratios.
    #[must_use]
    pub fn table(&self) -> String {
        let mut head = vec![String::new()];
        head.extend(self.paths.iter().map(ToString::to_string));
        let ratios = self.ratios();
        head.extend(ratios.iter().map(|(of, to)| format!("{of} ÷ {to}")));
        let mut lines = vec![head];
        for row in &self.rows {
            let mut line = vec![format!("{}, {}", row.workload, row.figure)];
            line.extend(row.rounds.iter().map(|rounds| cell(rounds)));
            line.extend(ratios.iter().map(|&(of, to)| {
                self.ratio(row, of, to)
                    .map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"))
            }));
            lines.push(line);
        }
        markdown(&lines)
    }

    /// The goals in Markdown, with measured values and verdicts.
    #[must_use]
    pub fn goals(&self) -> String {
        let mut lines = vec![["goal", "measured", "verdict"].map(str::to_owned).to_vec()];
        for goal in GOALS {
            let measured = self.measured(goal);
            let figure = measured.map_or_else(|| "–".to_owned(), number);
            lines.push(vec![goal.to_string(), figure, goal.verdict(measured).to_string()]);
        }
        markdown(&lines)
    }

    fn measured(&self, goal: &Goal) -> Option<f64> {
        let is_meant =
            |row: &&Row| row.workload == goal.workload && row.figure.starts_with(goal.figure);
        let of = |row| match goal.against {
            Some(other) => self.ratio(row, goal.path, other),
            None => median(self.rounds(row, goal.path)?),
        };
        self.rows.iter().filter(is_meant).filter_map(of).reduce(f64::max)
    }

    /// The machine, the options and every figure of every round.
    #[must_use]
    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let named = |(path, rounds): (&PathName, &Vec<f64>)| (path.to_string(), json!(rounds));
            let rounds: serde_json::Map<_, _> = self.paths.iter().zip(&row.rounds).map(named).collect();
            let ratio = |(of, to)| Some((format!("{of}/{to}"), json!(self.ratio(row, of, to)?)));
            let ratios: serde_json::Map<_, _> = self.ratios().into_iter().filter_map(ratio).collect();
            json!({ "workload": row.workload, "figure": row.figure, "rounds": rounds, "ratios": ratios })
        });
        let goals: Vec<_> = GOALS.iter().map(|goal| goal.json(self.measured(goal))).collect();
        json!({ "environment": self.environment, "rows": rows.collect::<Vec<_>>(), "goals": goals })
    }

    /// The pairs of compared paths: each proxy with direct connections, with the relay, and with
    /// ztunnel; a node daemon with one of one process.
    fn ratios(&self) -> Vec<(PathName, PathName)> {
        use PathName::{
            Direct, Hbone, Node, NodeOneProcess, Plain, RelayCopy, RelaySplice, ZtunnelHbone,
            ZtunnelPlain,
        };
        let pairs = [
            (Plain, Direct),
            (Plain, RelaySplice),
            (Plain, ZtunnelPlain),
            (Hbone, Direct),
            (Hbone, RelayCopy),
            (Hbone, ZtunnelHbone),
            (Node, NodeOneProcess),
        ];
        let has = |path: &PathName| self.paths.contains(path);
        pairs.into_iter().filter(|(of, to)| has(of) && has(to)).collect()
    }

    fn rounds<'a>(&self, row: &'a Row, path: PathName) -> Option<&'a Vec<f64>> {
        row.rounds.get(self.paths.iter().position(|known| *known == path)?)
    }

    fn ratio(&self, row: &Row, of: PathName, to: PathName) -> Option<f64> {
        let pairs = self.rounds(row, of)?.iter().zip(self.rounds(row, to)?);
        // 0/0 is not a ratio.
        let ratios = pairs.map(|(of, to)| of / to).filter(|ratio| ratio.is_finite());
        median(&ratios.collect::<Vec<_>>())
    }
}

fn cell(rounds: &[f64]) -> String {
    let Some(middle) = median(rounds) else {
        return "–".to_owned();
    };
    let least = rounds.iter().copied().fold(f64::INFINITY, f64::min);
    let most = rounds.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match rounds.len() {
        1 => number(middle),
        _ => format!("{} ({}–{})", number(middle), number(least), number(most)),
    }
}

/// Formats with three significant digits.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        ..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get((sorted.len() - 1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// A Markdown table: the first line is the header, the first column is text, all others are
/// figures.
pub(crate) fn markdown(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut table = String::new();
    for (index, line) in lines.iter().enumerate() {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let padded =
                if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") };
            write!(table, "| {padded} ").expect("a String takes everything");
        }
        table.push_str("|\n");
        if index == 0 {
            for (column, width) in widths.iter().enumerate() {
                let rule = "-".repeat(*width);
                let end = if column == 0 { '-' } else { ':' };
                write!(table, "|-{rule}{end}").expect("a String takes everything");
            }
            table.push_str("|\n");
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_middle_or_mean_of_two() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
    }

    #[test]
    fn ratio_is_computed_within_rounds() {
        let mut report = report(&[PathName::Direct, PathName::Hbone]);
        // The machine slowed down between the rounds, but the ratio is the same.
        let row = Row {
            workload: String::new(),
            figure: "",
            rounds: vec![vec![10.0, 5.0], vec![5.0, 2.5]],
        };
        assert_eq!(report.ratio(&row, PathName::Hbone, PathName::Direct), Some(0.5));
        report.rows.push(row);
        assert_eq!(report.json()["rows"][0]["ratios"]["hbone/direct"], 0.5);
    }

    #[test]
    fn missing_figure_prints_dash_without_ratio() {
        let mut report = report(&[PathName::Direct, PathName::Hbone]);
        let rounds = vec![vec![], vec![1.0, 3.0, 2.0]];
        report.rows.push(Row { workload: "bulk x1".to_owned(), figure: "CPU-s/GB", rounds });
        let table = report.table();
        let line = table.lines().nth(2).unwrap();
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        assert_eq!(cells, ["", "bulk x1, CPU-s/GB", "–", "2.00 (1.00–3.00)", "–", ""]);
    }

    #[test]
    fn goal_uses_ratio_within_rounds() {
        let mut report = report(&[PathName::Hbone, PathName::ZtunnelHbone]);
        let rounds = vec![vec![10.0, 5.0], vec![5.0, 2.5]];
        report.rows.push(Row { workload: "bulk x1".to_owned(), figure: "Gbit/s", rounds });
        assert_eq!(report.measured(&GOALS[0]), Some(2.0));
        assert_eq!(report.json()["goals"][0]["verdict"], "met");
        assert_eq!(report.json()["goals"][1]["verdict"], "not measured");
    }

    #[test]
    fn goal_uses_larger_of_both_sides() {
        let mut report = report(&[PathName::Hbone]);
        for (figure, kibibytes) in
            [("KiB each, client's side", 3.0), ("KiB each, server's side", 5.0)]
        {
            let rounds = vec![vec![kibibytes]];
            report.rows.push(Row { workload: "idle x2000".to_owned(), figure, rounds });
        }
        let goal = GOALS.iter().find(|goal| goal.figure == "KiB each").unwrap();
        assert_eq!(report.measured(goal), Some(5.0));
    }

    fn report(paths: &[PathName]) -> Report {
        Report { paths: paths.to_vec(), environment: Value::Null, rows: Vec::new() }
    }
}
