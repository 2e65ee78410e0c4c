//! Measures the cost of additional connections, bulk streams and workloads at growing sizes.

use std::collections::BTreeMap;

use tokio::time::sleep;

use crate::clients::ClientSet;
use crate::load::{BulkDirection, RequestMode};
use crate::options::{Options, PathName};
use crate::paths::Path;
use crate::plot::Plot;
use crate::process::resident_kib;
use crate::report::{markdown, median, number};
use crate::server::ANSWER;
use crate::workload::{Meter, REST_DELAY, WARM_UP, bulk, requests};

/// The quantity that grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dimension {
    /// Open connections that have carried a request.
    Connections,
    /// Concurrent bulk streams.
    Streams,
    /// Workloads in the mesh.
    Workloads,
}

/// The figures of all rounds by size.
#[derive(Debug, Default)]
pub struct Scaling(BTreeMap<(Dimension, &'static str), Figures>);

/// The values of a figure, by path and size.
type Figures = BTreeMap<(String, usize), Vec<f64>>;

impl Dimension {
    /// All quantities.
    pub const ALL: [Self; 3] = [Self::Connections, Self::Streams, Self::Workloads];

    /// The sizes at which a path is measured.
    #[must_use]
    pub fn sizes(self, path: PathName) -> &'static [usize] {
        match self {
            // A plaintext connection needs two descriptors in each proxy; the limit is often
            // 20,000.
            Self::Connections if path == PathName::Plain => &[10, 100, 1_000, 5_000],
            Self::Connections => &[10, 100, 1_000, 5_000, 10_000],
            Self::Streams => &[1, 4, 16, 64],
            Self::Workloads => &[10, 100, 1_000, 10_000, 100_000],
        }
    }

    /// The name in plural, which is also part of file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Streams => "streams",
            Self::Workloads => "workloads",
        }
    }

    async fn measure(self, name: PathName, size: usize, options: &Options) -> Vec<Point> {
        // Boxed: otherwise the futures are too deeply nested for the compiler.
        match self {
            Self::Connections => Box::pin(connections(name, size, options)).await,
            Self::Streams => Box::pin(streams(name, size, options)).await,
            Self::Workloads => Box::pin(workloads(name, size, options)).await,
        }
    }
}

/// The name of a figure with its unit, and its value.
type Point = (&'static str, f64);

const REQUEST: &str = "CPU µs per request";
const CONNECTION: &str = "CPU µs per new connection";
const BULK: &str = "CPU-s per GB";

/// Measures costs in the presence of open connections, with fresh proxies.
async fn connections(name: PathName, size: usize, options: &Options) -> Vec<Point> {
    let path = Path::set_up(name, options).await;
    let resident = || path.processes().into_iter().map(resident_kib).fold(0.0, f64::max);
    // Establishes the tunnel and other resources of the first connection.
    drop(ClientSet::open(path.client(), path.target(ANSWER), 1));
    let before = resident();
    let mut clients = ClientSet::open(path.client(), path.target(ANSWER), size);
    let mut points = vec![("KiB per open connection", (resident() - before) / float(size))];
    points.extend(new_connection(&path, options).await);
    points.extend(bulk_cost(&path, 1, options).await);
    clients.answered();
    sleep(WARM_UP).await;
    let (meter, answered_before) = (Meter::start(&path), clients.answered());
    sleep(options.window()).await;
    let answered = clients.answered() - answered_before;
    let answered = float(usize::try_from(answered).expect("far fewer"));
    points.extend(meter.read().cpu.map(|cpu| (REQUEST, cpu * 1e6 / answered)));
    points
}

/// Measures the cost of bulk on `size` connections.
async fn streams(name: PathName, size: usize, options: &Options) -> Vec<Point> {
    bulk_cost(&Path::set_up(name, options).await, size, options).await
}

/// Measures costs with `size` additional workloads in the mesh.
async fn workloads(name: PathName, size: usize, options: &Options) -> Vec<Point> {
    let options = Options { workloads: size, ..options.clone() };
    let path = Path::set_up(name, &options).await;
    sleep(REST_DELAY).await;
    let resident = path.processes().into_iter().map(resident_kib).fold(0.0, f64::max);
    let mut points =
        vec![("s until ready", path.ready_after()), ("MiB at rest", resident / 1024.0)];
    points.extend(new_connection(&path, &options).await);
    let measured = requests(&path, options.window(), RequestMode::KeepAlive, 64).await;
    points.extend(measured.cpu_each.map(|cpu| (REQUEST, cpu)));
    points
}

async fn new_connection(path: &Path, options: &Options) -> Option<Point> {
    let measured = requests(path, options.window(), RequestMode::Once, 16).await;
    Some((CONNECTION, measured.cpu_each?))
}

async fn bulk_cost(path: &Path, streams: usize, options: &Options) -> Vec<Point> {
    let figures = bulk(path, options.window(), BulkDirection::Up, streams).await;
    figures.last().and_then(|cpu| cpu.value).map(|cpu| (BULK, cpu)).into_iter().collect()
}

fn float(count: usize) -> f64 {
    f64::from(u32::try_from(count).expect("there are fewer"))
}

impl Scaling {
    /// Measures one size on one path in another round.
    pub async fn measure(
        &mut self,
        what: Dimension,
        path: PathName,
        size: usize,
        options: &Options,
    ) {
        for (figure, value) in what.measure(path, size, options).await {
            let figures = self.0.entry((what, figure)).or_default();
            figures.entry((path.to_string(), size)).or_default().push(value);
        }
    }

    /// A table of medians for every quantity.
    #[must_use]
    pub fn tables(&self) -> String {
        let table = |what: Dimension| {
            let of_dimension = || self.0.iter().filter(move |((growing, _), _)| *growing == what);
            let mut sizes: Vec<_> = of_dimension()
                .flat_map(|(_, figures)| figures.keys().map(|(_, size)| *size))
                .collect();
            sizes.sort_unstable();
            sizes.dedup();
            let mut head = vec![what.name().to_owned()];
            head.extend(sizes.iter().map(usize::to_string));
            let mut lines = vec![head];
            for ((_, figure), values) in of_dimension() {
                for path in paths(values) {
                    let cell = |size| {
                        let rounds = values.get(&(path.clone(), size));
                        rounds.and_then(|all| median(all)).map_or_else(|| "–".to_owned(), number)
                    };
                    let mut line = vec![format!("{path}: {figure}")];
                    line.extend(sizes.iter().copied().map(cell));
                    lines.push(line);
                }
            }
            markdown(&lines)
        };
        let measured = |what: &Dimension| self.0.keys().any(|(growing, _)| growing == what);
        let tables: Vec<_> = Dimension::ALL.into_iter().filter(measured).map(table).collect();
        tables.join("\n")
    }

    /// A plot of each figure, with the name of its file.
    pub fn plots(&self) -> impl Iterator<Item = (String, Plot)> {
        self.0.iter().map(|((what, figure), values)| {
            let line = |path: String| {
                let points = values.iter().filter(|((of, _), _)| *of == path);
                let points =
                    points.filter_map(|((_, size), all)| Some((float(*size), median(all)?)));
                (path.clone(), points.collect())
            };
            let lines = paths(values).into_iter().map(line).collect();
            let title = format!("{figure}, by {}", what.name());
            (file_name(*what, figure), Plot { title, lines })
        })
    }
}

fn paths(values: &Figures) -> Vec<String> {
    let mut paths: Vec<_> = values.keys().map(|(path, _)| path.clone()).collect();
    paths.dedup();
    paths
}

/// For example `scaling-connections-cpu-us-per-request.svg`.
fn file_name(what: Dimension, figure: &str) -> String {
    let figure = figure.to_lowercase().replace('µ', "u").replace([' ', '/'], "-");
    format!("scaling-{}-{figure}.svg", what.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_have_file_per_figure_and_line_per_path() {
        let mut scaling = Scaling::default();
        let figures = scaling.0.entry((Dimension::Connections, REQUEST)).or_default();
        figures.insert(("hbone".to_owned(), 10), vec![30.0, 20.0, 10.0]);
        figures.insert(("plain".to_owned(), 100), vec![7.0]);
        let plots: Vec<_> = scaling.plots().collect();
        assert_eq!(plots[0].0, "scaling-connections-cpu-us-per-request.svg");
        assert_eq!(plots[0].1.lines[0], ("hbone".to_owned(), vec![(10.0, 20.0)]));
        let table = scaling.tables();
        assert!(table.contains("| hbone: CPU µs per request | 20.0 |"), "{table}");
    }
}
