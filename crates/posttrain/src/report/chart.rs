//! Small SVG drawings. Colours are CSS variables of the page, so that one drawing serves light and dark.

use std::fmt::Write as _;

/// Text made safe for HTML and SVG.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            // Control characters are not allowed in XML at all.
            c if c.is_control() && c != '\n' && c != '\t' => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// A number in as few characters as show three significant digits.
pub fn short(value: f64) -> String {
    let size = value.abs();
    let text = match size {
        _ if value == 0.0 => return "0".into(),
        _ if !(1e-3..1e6).contains(&size) => return format!("{value:.1e}"),
        _ if size >= 100.0 => format!("{value:.0}"),
        _ if size >= 10.0 => format!("{value:.1}"),
        _ if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Round positions that cover `low..=high`, about `count` of them.
pub fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let span = high - low;
    if !(span.is_finite() && span > 0.0) {
        return vec![low];
    }
    let raw = span / count as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step =
        [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= raw * 0.999).unwrap_or(raw);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// One curve: a metric over the steps of a run.
pub struct Curve {
    /// The metric's name.
    pub name: String,
    /// What it means, in a few words.
    pub caption: &'static str,
    /// Step and value; steps ascend, values are finite.
    pub points: Vec<(f64, f64)>,
}

/// The moving average that is drawn over a noisy curve: each point with its neighbours on both sides, fewer at the ends.
pub fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = (points.len() / 12).max(1);
    (0..points.len())
        .map(|i| {
            let reach = reach.min(i).min(points.len() - 1 - i).max(reach / 2);
            let near = &points[i.saturating_sub(reach)..(i + reach + 1).min(points.len())];
            (points[i].0, near.iter().map(|point| point.1).sum::<f64>() / near.len() as f64)
        })
        .collect()
}

const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 190.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 22.0;

/// The frame of a plot: maps values to the drawing, draws grid and labels.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    fn of(points: &[(f64, f64)]) -> Self {
        let range = |value: fn(&(f64, f64)) -> f64| {
            let values = points.iter().map(value);
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        };
        let (x, (low, high)) = (range(|point| point.0), range(|point| point.1));
        // A flat curve gets room above and below; a share of nearly zero is not blown up to full height.
        let pad = if high > low { 0.06 * (high - low) } else { (0.1 * high.abs()).max(1e-3) };
        let floor = if low >= 0.0 && low < 0.35 * high { 0.0 } else { low - pad };
        Self { x: if x.1 > x.0 { x } else { (x.0 - 0.5, x.1 + 0.5) }, y: (floor, high + pad) }
    }

    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let across = (x - self.x.0) / (self.x.1 - self.x.0);
        let up = (y - self.y.0) / (self.y.1 - self.y.0);
        (LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM))
    }

    /// Grid and labels; `whole` leaves only whole numbers on the horizontal axis, as steps are.
    fn axes(&self, whole: bool) -> String {
        let mut svg = String::new();
        for tick in ticks(self.y.0, self.y.1, 4) {
            let (_, y) = self.at((self.x.0, tick));
            let _ = write!(
                svg,
                r#"<line class="grid" x1="{LEFT}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 3.5,
                short(tick)
            );
        }
        for tick in ticks(self.x.0, self.x.1, 5).into_iter().filter(|tick| !whole || tick.fract() == 0.0) {
            let (x, _) = self.at((tick, self.y.0));
            let _ = write!(
                svg,
                r#"<text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                HEIGHT - 6.0,
                short(tick)
            );
        }
        svg
    }

    fn line(&self, class: &str, points: &[(f64, f64)]) -> String {
        let path: Vec<String> = points
            .iter()
            .map(|point| {
                let (x, y) = self.at(*point);
                format!("{x:.1},{y:.1}")
            })
            .collect();
        format!(r#"<polyline class="{class}" points="{}"/>"#, path.join(" "))
    }
}

impl Curve {
    /// Whether the points scatter, so that their average tells more than they do.
    fn is_noisy(&self) -> bool {
        self.points.len() > 12 && self.name != "learning_rate"
    }

    /// What is drawn strong.
    fn strong(&self) -> Vec<(f64, f64)> {
        if self.is_noisy() { smooth(&self.points) } else { self.points.clone() }
    }

    /// Where the strong curve ends.
    pub fn last(&self) -> f64 {
        self.strong().last().map_or(f64::NAN, |point| point.1)
    }

    /// The curve as an `<svg>` element: each step's value faint, the moving average strong.
    pub fn svg(&self) -> String {
        let frame = Frame::of(&self.points);
        let mut svg = format!(
            r#"<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{} over steps">"#,
            escape(&self.name)
        );
        svg += &frame.axes(true);
        if self.is_noisy() {
            svg += &frame.line("raw", &self.points);
        }
        svg += &frame.line("mean", &self.strong());
        let crowded = self.points.len() > 12;
        for &(step, value) in &self.points {
            let (x, y) = frame.at((step, value));
            let radius = if crowded { 5.0 } else { 2.5 };
            let class = if crowded { "hover" } else { "dot" };
            let _ = write!(
                svg,
                r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{radius}"><title>step {}: {}</title></circle>"#,
                short(step),
                short(value)
            );
        }
        svg + "</svg>"
    }
}

/// A curve: points in order.
pub type Points = Vec<(f64, f64)>;

/// Curves of several competitors in one plot, with a legend.
pub struct Lines {
    /// What it shows.
    pub title: String,
    /// Names of the axes, the horizontal one first.
    pub axes: (String, String),
    /// Name of a competitor, and its curve in every repetition; the strong line is their mean, where they have as many points.
    pub competitors: Vec<(String, Vec<Points>)>,
    /// Draw the diagonal.
    pub diagonal: bool,
}

/// Colours of lines: distinct in light and dark, and for those who see few colours in pairs of hue and lightness.
const LINES: [&str; 8] = ["#0f6fde", "#d9541e", "#12924e", "#8458c4", "#c98a12", "#0d9db0", "#c23b77", "#7a838c"];

impl Lines {
    /// The mean over the repetitions, point by point; the first one where they differ in length.
    fn mean(repetitions: &[Points]) -> Points {
        let Some(first) = repetitions.first() else { return Vec::new() };
        if repetitions.iter().any(|other| other.len() != first.len()) {
            return first.clone();
        }
        let count = repetitions.len() as f64;
        let at = |i: usize| {
            let sum = repetitions.iter().fold((0.0, 0.0), |sum, points| (sum.0 + points[i].0, sum.1 + points[i].1));
            (sum.0 / count, sum.1 / count)
        };
        (0..first.len()).map(at).collect()
    }

    /// The plot as an `<svg>` element: every repetition faint, their mean strong.
    pub fn svg(&self) -> String {
        let mut all: Vec<(f64, f64)> =
            self.competitors.iter().flat_map(|(_, curves)| curves.iter().flatten().copied()).collect();
        if self.diagonal {
            all.extend([(0.0, 0.0), (1.0, 1.0)]);
        }
        if all.is_empty() {
            return String::new();
        }
        let frame = Frame::of(&all);
        let mut svg = format!(
            r#"<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}">"#,
            escape(&self.title)
        );
        svg += &frame.axes(false);
        if self.diagonal {
            svg += &frame.line("grid", &[(0.0, 0.0), (1.0, 1.0)]);
        }
        for (i, (name, curves)) in self.competitors.iter().enumerate() {
            let color = LINES[i % LINES.len()];
            let _ = write!(svg, r#"<g style="fill:none;stroke:{color}"><title>{}</title>"#, escape(name));
            if curves.len() > 1 {
                let _ = write!(svg, r#"<g stroke-width="1" opacity="0.25">"#);
                svg.extend(curves.iter().map(|points| frame.line("", points)));
                svg += "</g>";
            }
            svg += r#"<g stroke-width="2" stroke-linejoin="round">"#;
            svg += &frame.line("", &Self::mean(curves));
            svg += "</g></g>";
        }
        svg + "</svg>"
    }

    /// The plot with its title, axes and legend.
    pub fn html(&self) -> String {
        let legend: String = (self.competitors.iter().enumerate())
            .map(|(i, (name, _))| {
                format!(
                    r#"<li><span class="swatch" style="background:{}"></span>{}</li>"#,
                    LINES[i % LINES.len()],
                    escape(name)
                )
            })
            .collect();
        format!(
            "<figure><figcaption><span>{}</span></figcaption><p class=\"note\">{} over {}</p>{}<ul class=\"legend\">{legend}</ul></figure>\n",
            escape(&self.title),
            escape(&self.axes.1),
            escape(&self.axes.0),
            self.svg()
        )
    }
}

/// A number with its interval, as a row of [`intervals`].
pub struct Estimate {
    /// What was measured.
    pub label: String,
    /// The number.
    pub value: f64,
    /// The interval's lower end.
    pub low: f64,
    /// The interval's upper end.
    pub high: f64,
    /// Whether the number is a proportion, 0 to 1, which is shown in percent.
    pub share: bool,
}

impl Estimate {
    /// A number of this kind.
    pub fn shown(&self, value: f64) -> String {
        if self.share { format!("{:.1} %", value * 100.0) } else { short(value) }
    }
}

/// Numbers as dots with their intervals as whiskers, one above the other on a common scale; proportions in percent.
pub fn intervals(estimates: &[Estimate]) -> String {
    let (width, row, left, right) = (720.0, 44.0, 90.0, 20.0);
    let shares = estimates.iter().all(|estimate| estimate.share);
    let low = estimates.iter().map(|estimate| estimate.low).fold(if shares { 1.0 } else { f64::INFINITY }, f64::min);
    let high =
        estimates.iter().map(|estimate| estimate.high).fold(if shares { 0.0 } else { f64::NEG_INFINITY }, f64::max);
    // Ends are round numbers, and never the same.
    let parts = match high > low {
        _ if shares => 10.0,
        true => 10f64.powf(-(high - low).log10().floor()),
        false => 10.0 / low.abs().max(1.0),
    };
    let low = (low * parts).floor() / parts;
    let high = ((high * parts).ceil() / parts).max(low + 1.0 / parts);
    let at = |value: f64| left + (value - low) / (high - low) * (width - left - right);
    let bottom = row * estimates.len() as f64 + 8.0;
    let mut svg = format!(
        r#"<svg class="intervals" viewBox="0 0 {width} {}" role="img" aria-label="before and after">"#,
        bottom + 20.0
    );
    for tick in ticks(low, high, 6) {
        let x = at(tick);
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{x:.1}" x2="{x:.1}" y1="4" y2="{bottom}"/><text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            bottom + 16.0,
            if shares { format!("{:.0} %", tick * 100.0) } else { short(tick) }
        );
    }
    for (i, estimate) in estimates.iter().enumerate() {
        let y = row * (i as f64 + 0.5) + 8.0;
        let class = if i + 1 == estimates.len() { "after" } else { "before" };
        let (from, to, x) = (at(estimate.low), at(estimate.high), at(estimate.value));
        // The number stands above its dot, kept inside the drawing.
        let _ = write!(
            svg,
            r#"<g class="{class}"><text class="name" x="{:.1}" y="{:.1}" text-anchor="end">{}</text><line class="whisker" x1="{from:.1}" x2="{to:.1}" y1="{y}" y2="{y}"/><line class="whisker" x1="{from:.1}" x2="{from:.1}" y1="{:.1}" y2="{:.1}"/><line class="whisker" x1="{to:.1}" x2="{to:.1}" y1="{:.1}" y2="{:.1}"/><circle cx="{x:.1}" cy="{y}" r="7"/><text class="value" x="{:.1}" y="{:.1}" text-anchor="middle">{}</text></g>"#,
            left - 14.0,
            y + 4.5,
            escape(&estimate.label),
            y - 5.0,
            y + 5.0,
            y - 5.0,
            y + 5.0,
            x.clamp(left + 20.0, width - right - 20.0),
            y - 12.0,
            estimate.shown(estimate.value)
        );
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 1.0, 0.5, 12.345, 123.4, 1e-6, 2_500_000.0, -0.25].map(short);
        assert_eq!(shown, ["0", "1", "0.5", "12.3", "123", "1.0e-6", "2.5e6", "-0.25"]);
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 1.0, 4), [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(ticks(0.0, 60.0, 5), [0.0, 20.0, 40.0, 60.0]);
        assert_eq!(ticks(3.0, 3.0, 5), [3.0]);
    }

    #[test]
    fn smoothing_keeps_a_straight_line_inside() {
        let line: Vec<_> = (0..50).map(|i| (f64::from(i), 2.0 + f64::from(i))).collect();
        assert_eq!(smooth(&line)[10..40], line[10..40]);
        assert_eq!(smooth(&line[..1]), line[..1]);
    }

    #[test]
    fn drawings_survive_odd_values() {
        for points in [vec![(0.0, 0.0)], vec![(1.0, 5.0), (2.0, 5.0)], vec![(1.0, -1e9), (2.0, 1e9)]] {
            let svg = Curve { name: "a<b".into(), caption: "", points }.svg();
            assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.contains("a&lt;b"), "{svg}");
        }
        let lines = |curves| Lines {
            title: "a<b".into(),
            axes: ("x".into(), "y".into()),
            competitors: vec![("one".into(), curves)],
            diagonal: true,
        };
        for curves in [vec![], vec![vec![]], vec![vec![(0.0, 0.0)], vec![]], vec![vec![(0.0, 1.0), (2.0, 1.0)]; 3]] {
            let html = lines(curves).html();
            assert!(!html.contains("NaN") && !html.contains("inf") && html.contains("a&lt;b"), "{html}");
        }
        let all = Estimate { label: "x".into(), value: 1.0, low: 1.0, high: 1.0, share: true };
        assert!(!intervals(&[all]).contains("NaN"));
    }
}
