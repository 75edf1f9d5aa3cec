//! What chat templates expect of Python and of `transformers`, in minijinja.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

/// How the message of a template's own `raise_exception` starts.
pub(super) const REFUSED: &str = "the template refuses the conversation";

/// A day, for templates that name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    /// Year of the Gregorian calendar.
    pub year: i32,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
}

impl Default for Date {
    fn default() -> Self {
        Self { year: 2024, month: 7, day: 26 }
    }
}

/// An environment with the settings, functions and filters of `transformers`.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(format);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| text(value));
    environment.add_filter("trim", trim);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_iterable);
    environment.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{REFUSED}: {message}")))
    });
    set_date(&mut environment, Date::default());
    environment
}

/// Whether Python could iterate: over undefined values too, but not over none.
fn is_iterable(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), Undefined | String | Seq | Iterable | Map)
}

/// `str(value).strip(characters)`.
fn trim(value: &Value, characters: Option<&str>) -> String {
    let text = text(value);
    match characters {
        Some(characters) => text.trim_matches(|c| characters.contains(c)).to_owned(),
        None => text.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)).to_owned(),
    }
}

/// Fixes the day of `strftime_now`.
pub(super) fn set_date(environment: &mut Environment, date: Date) {
    environment.add_function("strftime_now", move |pattern: &str| date.format(pattern));
}

impl Date {
    /// `strftime` at midnight of this day, in the C locale.
    fn format(self, pattern: &str) -> Result<String, Error> {
        const MONTHS: [&str; 12] = [
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ];
        const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
        let month = MONTHS[usize::from(self.month.clamp(1, 12)) - 1];
        let weekday = DAYS[self.weekday()];
        let mut output = String::new();
        let mut characters = pattern.chars();
        while let Some(character) = characters.next() {
            if character != '%' {
                output.push(character);
                continue;
            }
            let directive = characters.next();
            let written = match directive {
                Some('Y') => write!(output, "{}", self.year),
                Some('y') => write!(output, "{:02}", self.year.rem_euclid(100)),
                Some('m') => write!(output, "{:02}", self.month),
                Some('d') => write!(output, "{:02}", self.day),
                Some('B') => write!(output, "{month}"),
                Some('b' | 'h') => write!(output, "{}", &month[..3]),
                Some('A') => write!(output, "{weekday}"),
                Some('a') => write!(output, "{}", &weekday[..3]),
                Some('F') => write!(output, "{}-{:02}-{:02}", self.year, self.month, self.day),
                Some('H' | 'M' | 'S') => write!(output, "00"),
                Some('%') => write!(output, "%"),
                _ => {
                    let name = directive.map(String::from).unwrap_or_default();
                    let detail = format!("strftime_now does not know %{name}");
                    return Err(Error::new(ErrorKind::InvalidOperation, detail));
                }
            };
            // Writing to a string cannot fail.
            let _ = written;
        }
        Ok(output)
    }

    /// 0 for Sunday (Sakamoto's method).
    fn weekday(self) -> usize {
        const OFFSETS: [i32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = if self.month < 3 { self.year - 1 } else { self.year };
        let offset = OFFSETS[usize::from(self.month.clamp(1, 12)) - 1];
        let days =
            year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + offset + i32::from(self.day);
        days.rem_euclid(7) as usize
    }
}

/// Prints a value as Python's `str` would.
fn format(output: &mut Output, _: &State, value: &Value) -> Result<(), Error> {
    output.write_str(&text(value)).map_err(|error| Error::new(ErrorKind::WriteFailure, error.to_string()))
}

/// Python's `str`.
fn text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => {
            let mut output = String::new();
            represent(value, &mut output);
            output
        }
    }
}

/// Python's `repr`.
fn represent(value: &Value, output: &mut String) {
    match value.kind() {
        ValueKind::None => output.push_str("None"),
        ValueKind::Bool => output.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => output.push_str(&number(value)),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), output),
        ValueKind::Seq | ValueKind::Iterable => {
            output.push('[');
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                output.push_str(if index > 0 { ", " } else { "" });
                represent(&item, output);
            }
            output.push(']');
        }
        ValueKind::Map => {
            output.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                output.push_str(if index > 0 { ", " } else { "" });
                represent(&key, output);
                output.push_str(": ");
                represent(&value.get_item(&key).unwrap_or_default(), output);
            }
            output.push('}');
        }
        _ => output.push_str(&value.to_string()),
    }
}

/// A string as a Python literal: single quotes unless only these occur in it.
fn quote(text: &str, output: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    output.push(quote);
    for character in text.chars() {
        match character {
            '\\' => output.push_str("\\\\"),
            '\n' => output.push_str("\\n"),
            '\r' => output.push_str("\\r"),
            '\t' => output.push_str("\\t"),
            c if c == quote => output.extend(['\\', c]),
            c if c < ' ' || c == '\u{7f}' => output.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => output.push(c),
        }
    }
    output.push(quote);
}

/// A number as Python prints it: floats with the shortest digits that read back, and always with a point or exponent.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if !float.is_finite() {
        return if float.is_nan() {
            "nan".into()
        } else if float > 0.0 {
            "inf".into()
        } else {
            "-inf".into()
        };
    }
    let magnitude = float.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let scientific = format!("{float:e}");
        let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{float:?}")
}

/// `json.dumps(value, ensure_ascii=..., indent=..., separators=..., sort_keys=...)`, where `ensure_ascii` is false unless given.
fn to_json(value: &Value, arguments: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    let sort_keys: Option<bool> = arguments.get("sort_keys")?;
    let ensure_ascii: Option<bool> = arguments.get("ensure_ascii")?;
    arguments.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings")),
        None => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let (sort_keys, ensure_ascii) = (sort_keys.unwrap_or(false), ensure_ascii.unwrap_or(false));
    let mut writer = Json { output: String::new(), indent, item, key, sort_keys, ensure_ascii };
    writer.write(value, 0)?;
    Ok(writer.output)
}

/// Writes JSON in the manner of Python's `json.dumps`.
struct Json {
    output: String,
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

impl Json {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None | ValueKind::Undefined => self.output.push_str("null"),
            ValueKind::Bool => self.output.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.output.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group('[', ']', depth, &items, |writer, item| writer.write(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.group('{', '}', depth, &keys, |writer, key| {
                    writer.string(&text(key));
                    writer.output.push_str(&writer.key.clone());
                    writer.write(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: cannot write {kind}"))),
        }
        Ok(())
    }

    fn group(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: &[Value],
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.output.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.output.push_str(&self.item.clone());
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.output.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.output.push('\n');
            self.output.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        for character in quoted.chars() {
            if self.ensure_ascii && !(' '..='~').contains(&character) {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    self.output.push_str(&format!("\\u{unit:04x}"));
                }
            } else {
                self.output.push(character);
            }
        }
    }
}
