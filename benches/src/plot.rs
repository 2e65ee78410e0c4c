//! Draws a figure over a growing size as SVG. The size axis is logarithmic, the figure axis linear
//! from 0, so constant cost is a horizontal line. Grey text on a transparent background is readable
//! on white and black.

use std::fmt::Write as _;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
/// Margins around the plot area for labels.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 40.0;
/// Readable on black and white.
const GREY: &str = "#808080";
const COLOURS: [&str; 4] = ["#1f8fd6", "#e0702a", "#3aa655", "#b05cc6"];

/// A plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot {
    /// The title.
    pub title: String,
    /// Named lines of points: size (above 0) and figure.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

impl Plot {
    /// The SVG document.
    #[must_use]
    pub fn svg(&self) -> String {
        let sizes = || self.lines.iter().flat_map(|(_, points)| points.iter().map(|point| point.0));
        let figures = self.lines.iter().flat_map(|(_, points)| points.iter().map(|point| point.1));
        let size_axis = SizeAxis::of(sizes());
        let figure_axis = FigureAxis::of(figures);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\" fill=\"{GREY}\">\n"
        );
        let mut draw = |element: String| {
            writeln!(svg, "{element}").expect("a String takes everything");
        };
        draw(text(LEFT, 20.0, "start", &self.title));
        for value in figure_axis.marks() {
            let y = figure_axis.at(value);
            draw(format!(
                "<path d=\"M{LEFT} {y:.1}H{:.1}\" stroke=\"{GREY}\" stroke-opacity=\"0.4\"/>",
                WIDTH - RIGHT
            ));
            draw(text(LEFT - 8.0, y + 4.0, "end", &format!("{value}")));
        }
        let mut marks: Vec<_> = sizes().collect();
        marks.sort_by(f64::total_cmp);
        marks.dedup();
        for size in marks {
            draw(text(size_axis.at(size), HEIGHT - BOTTOM + 18.0, "middle", &format!("{size}")));
        }
        for (index, ((name, points), colour)) in
            self.lines.iter().zip(COLOURS.iter().cycle()).enumerate()
        {
            let place = |&(size, figure): &(f64, f64)| (size_axis.at(size), figure_axis.at(figure));
            let places: Vec<_> = points.iter().map(place).collect();
            let line: Vec<_> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            draw(format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                line.join(" ")
            ));
            for (x, y) in places {
                draw(format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
            }
            let from_right = f64::from(u32::try_from(self.lines.len() - index).unwrap_or(1));
            let x = WIDTH - RIGHT - from_right * 110.0 + 110.0;
            draw(format!("<g fill=\"{colour}\">{}</g>", text(x, 20.0, "end", name)));
        }
        svg.push_str("</svg>\n");
        svg
    }
}

fn text(x: f64, y: f64, anchor: &str, text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>")
}

/// The horizontal axis: logarithmic, from the smallest size to the largest.
struct SizeAxis {
    least: f64,
    most: f64,
}

impl SizeAxis {
    fn of(sizes: impl Iterator<Item = f64>) -> Self {
        let (least, most) = sizes.fold((f64::INFINITY, 0.0_f64), |(least, most), size| {
            (least.min(size), most.max(size))
        });
        Self { least, most }
    }

    fn at(&self, size: f64) -> f64 {
        let span = (self.most / self.least).ln();
        let share = if span > 0.0 { (size / self.least).ln() / span } else { 0.5 };
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }
}

/// The vertical axis: linear, from 0 to a round number.
struct FigureAxis {
    step: f64,
    most: f64,
}

impl FigureAxis {
    fn of(figures: impl Iterator<Item = f64>) -> Self {
        let most = figures.fold(f64::MIN_POSITIVE, f64::max);
        let magnitude = 10_f64.powf(most.log10().floor());
        // Three to ten ticks.
        let step = match most / magnitude {
            ..2.0 => magnitude / 4.0,
            2.0..5.0 => magnitude / 2.0,
            _ => magnitude,
        };
        Self { step, most: (most / step).ceil() * step }
    }

    fn marks(&self) -> impl Iterator<Item = f64> {
        let marks = (0..=10).map(|number| f64::from(number) * self.step);
        // Rounding hides errors of floating point.
        let shown = marks.map(|mark| format!("{mark:.6}").parse().unwrap_or(mark));
        shown.take_while(|mark| *mark <= self.most * 1.001)
    }

    fn at(&self, figure: f64) -> f64 {
        HEIGHT - BOTTOM - figure / self.most * (HEIGHT - TOP - BOTTOM)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_constant_factor_are_equidistant() {
        let size_axis = SizeAxis::of([10.0, 1000.0].into_iter());
        assert_eq!(size_axis.at(10.0), LEFT);
        assert_eq!(size_axis.at(1000.0), WIDTH - RIGHT);
        assert!((size_axis.at(100.0) - f64::midpoint(LEFT, WIDTH - RIGHT)).abs() < 1e-9);
    }

    #[test]
    fn single_size_is_centred() {
        assert_eq!(SizeAxis::of([7.0].into_iter()).at(7.0), f64::midpoint(LEFT, WIDTH - RIGHT));
    }

    #[test]
    fn axis_starts_at_zero_and_ends_at_round_number() {
        let figure_axis = FigureAxis::of([3.0, 371.0].into_iter());
        assert_eq!(
            figure_axis.marks().collect::<Vec<_>>(),
            (0..9).map(|n| f64::from(n) * 50.0).collect::<Vec<_>>()
        );
        assert_eq!(figure_axis.at(0.0), HEIGHT - BOTTOM);
        assert_eq!(figure_axis.at(400.0), TOP);
        assert_eq!(FigureAxis::of([0.31].into_iter()).marks().last(), Some(0.35));
    }

    #[test]
    fn plot_draws_every_line_without_nan() {
        let lines = vec![
            ("plain".to_owned(), vec![(10.0, 1.0), (100.0, 2.0)]),
            ("<hbone>".to_owned(), vec![(10.0, 0.0)]),
        ];
        let svg = Plot { title: "CPU & more".to_owned(), lines }.svg();
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("CPU &amp; more") && svg.contains("&lt;hbone>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf\""));
    }
}
