// A complete subject for Leadline in one file of Rust, standard library alone: rmsnorm, forward and backward.
//
//     rustc --edition 2021 -O -o example example.rs && leadline smoke exec:./example && leadline verify exec:./example --op rmsnorm
//
// It speaks leadline.exec/1: a JSON object a line on standard input, one a line back on standard output, arrays in safetensors files.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};

type Result<T> = std::result::Result<T, String>;

// JSON: values, and what reads them.

enum Json {
    Null,
    Number(f64), // true and false, too: 1 and 0
    Text(String),
    List(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

impl Json {
    fn get(&self, name: &str) -> Result<&Json> {
        match self {
            Json::Object(members) => members.get(name).ok_or(format!("there is no {name}")),
            _ => Err(format!("{name} is looked for in what is no object")),
        }
    }

    fn text(&self) -> Result<&str> {
        if let Json::Text(text) = self { Ok(text) } else { Err("expected a string".into()) }
    }

    fn number(&self) -> Result<f64> {
        if let Json::Number(value) = self { Ok(*value) } else { Err("expected a number".into()) }
    }

    fn numbers(&self) -> Result<Vec<usize>> {
        let Json::List(items) = self else { return Err("expected a list".into()) };
        items.iter().map(|item| Ok(item.number()? as usize)).collect()
    }
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn next(&mut self) -> u8 {
        while self.at < self.bytes.len() && self.bytes[self.at].is_ascii_whitespace() {
            self.at += 1;
        }
        self.bytes.get(self.at).copied().unwrap_or(0)
    }

    fn take(&mut self, byte: u8) -> bool {
        let here = self.next() == byte;
        self.at += here as usize;
        here
    }

    fn expect(&mut self, byte: u8) -> Result<()> {
        if self.take(byte) { Ok(()) } else { Err(format!("expected {} in JSON", byte as char)) }
    }

    fn string(&mut self) -> Result<String> {
        self.expect(b'"')?;
        let mut bytes = Vec::new();
        loop {
            let byte = *self.bytes.get(self.at).ok_or("a string has no end")?;
            self.at += 1;
            match byte {
                b'"' => return String::from_utf8(bytes).map_err(|error| error.to_string()),
                b'\\' => {
                    let escape = *self.bytes.get(self.at).ok_or("a string has no end")?;
                    self.at += 1;
                    let meant = match escape {
                        b'b' => '\u{8}',
                        b'f' => '\u{c}',
                        b'n' => '\n',
                        b'r' => '\r',
                        b't' => '\t',
                        b'u' => {
                            let digits = self.bytes.get(self.at..self.at + 4).ok_or("a string has no end")?;
                            self.at += 4;
                            let code = u32::from_str_radix(&String::from_utf8_lossy(digits), 16).map_err(|error| error.to_string())?;
                            char::from_u32(code).ok_or("pairs of surrogates are not read here")?
                        }
                        other => other as char,
                    };
                    bytes.extend(meant.to_string().bytes());
                }
                byte => bytes.push(byte),
            }
        }
    }

    fn value(&mut self) -> Result<Json> {
        match self.next() {
            b'"' => Ok(Json::Text(self.string()?)),
            b'{' => {
                self.at += 1;
                let mut members = BTreeMap::new();
                while !self.take(b'}') {
                    self.next();
                    let name = self.string()?;
                    self.expect(b':')?;
                    members.insert(name, self.value()?);
                    if self.next() != b'}' {
                        self.expect(b',')?;
                    }
                }
                Ok(Json::Object(members))
            }
            b'[' => {
                self.at += 1;
                let mut items = Vec::new();
                while !self.take(b']') {
                    items.push(self.value()?);
                    if self.next() != b']' {
                        self.expect(b',')?;
                    }
                }
                Ok(Json::List(items))
            }
            _ => {
                let rest = &self.bytes[self.at..];
                let word = &rest[..rest.iter().position(|b| b",]} \t\r\n".contains(b)).unwrap_or(rest.len())];
                self.at += word.len();
                match std::str::from_utf8(word).unwrap_or("") {
                    "null" => Ok(Json::Null),
                    "true" => Ok(Json::Number(1.0)),
                    "false" => Ok(Json::Number(0.0)),
                    digits => digits.parse().map(Json::Number).map_err(|_| format!("{digits:?} is no JSON")),
                }
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Json> {
    Parser { bytes, at: 0 }.value()
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " "))
}

// Arrays, and safetensors: 8 bytes of length, a JSON header, the data.

struct Array {
    dtype: String, // F64, F32 or BF16
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Array {
    fn like(other: &Array) -> Array {
        Array { dtype: other.dtype.clone(), shape: other.shape.clone(), values: vec![0.0; other.values.len()] }
    }
}

type Arrays = BTreeMap<String, Array>;

fn size_of(dtype: &str) -> Result<usize> {
    match dtype {
        "F64" => Ok(8),
        "F32" => Ok(4),
        "BF16" => Ok(2),
        _ => Err(format!("dtype {dtype} is not read here")),
    }
}

fn decode(bytes: &[u8]) -> f64 {
    match *bytes {
        [a, b] => f32::from_le_bytes([0, 0, a, b]) as f64, // BF16 is the upper half of F32
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]) as f64,
        _ => f64::from_le_bytes(bytes.try_into().expect("eight bytes")),
    }
}

fn encode(data: &mut Vec<u8>, dtype: &str, value: f64) {
    let bits = (value as f32).to_bits();
    match dtype {
        "F64" => data.extend(value.to_le_bytes()),
        "F32" => data.extend(bits.to_le_bytes()),
        _ if value.is_nan() => data.extend(0x7FC0u16.to_le_bytes()),
        _ => data.extend((((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16).to_le_bytes()), // to nearest, ties to even
    }
}

fn read(path: &str) -> Result<Arrays> {
    let bytes = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    let length = u64::from_le_bytes(bytes.get(..8).ok_or("no header")?.try_into().expect("eight bytes")) as usize;
    let Json::Object(header) = parse(bytes.get(8..8 + length).ok_or("the header is cut off")?)? else { return Err("no header".into()) };
    let mut arrays = Arrays::new();
    for (name, about) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let (dtype, shape) = (about.get("dtype")?.text()?.to_string(), about.get("shape")?.numbers()?);
        let offsets = about.get("data_offsets")?.numbers()?;
        let data = bytes.get(8 + length + offsets[0]..8 + length + offsets[1]).ok_or(format!("{name} is cut off"))?;
        let values = data.chunks_exact(size_of(&dtype)?).map(decode).collect();
        arrays.insert(name.clone(), Array { dtype, shape, values });
    }
    Ok(arrays)
}

fn write(path: &str, arrays: &[(&str, Array)]) -> Result<()> {
    let (mut header, mut data) = (Vec::new(), Vec::new());
    for (name, array) in arrays {
        let start = data.len();
        array.values.iter().for_each(|&value| encode(&mut data, &array.dtype, value));
        let (name, dtype, end) = (quoted(name), quoted(&array.dtype), data.len());
        header.push(format!("{name}:{{\"dtype\":{dtype},\"shape\":{:?},\"data_offsets\":[{start},{end}]}}", array.shape));
    }
    let header = format!("{{{}}}", header.join(","));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(path, bytes).map_err(|error| format!("{path}: {error}"))
}

// The op. Sums are in f64, results are rounded once, when they are written.

fn rstd(row: &[f64], eps: f64) -> f64 {
    1.0 / (row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64 + eps).sqrt()
}

// y[n,d] = weight[d] x[n,d] rstd[n],   rstd[n] = (mean_d x[n,d]² + eps)^(-1/2)
fn rmsnorm(x: &Array, weight: &Array, eps: f64) -> Vec<(&'static str, Array)> {
    let (d, mut y) = (weight.values.len(), Array::like(x));
    for (row, out) in x.values.chunks_exact(d).zip(y.values.chunks_exact_mut(d)) {
        let r = rstd(row, eps);
        for j in 0..d {
            out[j] = weight.values[j] * row[j] * r;
        }
    }
    vec![("y", y)]
}

// With xhat = x rstd and g = dy weight:   dx[n,d] = rstd[n] (g - xhat mean_d(g xhat)),   dweight[d] = Σ_n dy xhat
fn rmsnorm_backward(x: &Array, weight: &Array, dy: &Array, eps: f64) -> Vec<(&'static str, Array)> {
    let (d, mut dx, mut dweight) = (weight.values.len(), Array::like(x), Array::like(weight));
    let rows = x.values.chunks_exact(d).zip(dy.values.chunks_exact(d));
    for ((row, dy), out) in rows.zip(dx.values.chunks_exact_mut(d)) {
        let r = rstd(row, eps);
        let mean = (0..d).map(|j| dy[j] * weight.values[j] * row[j] * r).sum::<f64>() / d as f64;
        for j in 0..d {
            out[j] = r * (dy[j] * weight.values[j] - row[j] * r * mean);
            dweight.values[j] += dy[j] * row[j] * r;
        }
    }
    vec![("dx", dx), ("dweight", dweight)]
}

// The protocol.

const DESCRIPTION: &str = concat!(
    r#"{"ok": true, "ops": {"rmsnorm": {"directions": ["forward", "backward"], "attrs": ["eps"], "#,
    r#""precisions": ["fp32", "bf16", "fp64"]}}}"#
);

fn run(asked: &Json) -> Result<()> {
    let arrays = read(asked.get("inputs")?.text()?)?;
    let array = |name: &str| arrays.get(name).ok_or(format!("there is no {name}"));
    let eps = asked.get("attrs")?.get("eps")?.number()?;
    let outputs = match asked.get("direction")?.text()? {
        "backward" => rmsnorm_backward(array("x")?, array("weight")?, array("dy")?, eps),
        _ => rmsnorm(array("x")?, array("weight")?, eps),
    };
    write(asked.get("outputs")?.text()?, &outputs)
}

fn answer(line: &str) -> Result<Option<String>> {
    let asked = parse(line.as_bytes())?;
    Ok(match asked.get("command")?.text()? {
        "start" => Some(r#"{"ok": true, "name": "example.rs"}"#.into()),
        "describe" => Some(DESCRIPTION.into()),
        "run" if asked.get("op")?.text()? == "rmsnorm" => run(&asked).map(|_| Some(r#"{"ok": true}"#.into()))?,
        "run" => Some(r#"{"ok": false, "kind": "refused", "error": "rmsnorm is all there is"}"#.into()),
        "stop" => None,
        other => return Err(format!("unknown command {other}")),
    })
}

fn main() {
    for line in std::io::stdin().lock().lines().map_while(std::result::Result::ok) {
        let text = match answer(&line) {
            Ok(None) => return,
            Ok(Some(text)) => text,
            Err(error) => format!(r#"{{"ok": false, "kind": "failed", "error": {}}}"#, quoted(&error)),
        };
        println!("{text}");
        let _ = std::io::stdout().flush(); // the other side waits for it
    }
}
