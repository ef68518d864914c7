//! Sizes as people write them: `512MiB`, `2.5GiB`.

use std::ops::RangeInclusive;

use super::{diagnostic::visible, file::At, report::Report};

/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;
/// One TiB in bytes.
pub const TIB: u64 = 1 << 40;

/// The size at a key in bytes, a multiple of 1 MiB; `default` where it isn't given or is wrong, which is reported.
pub fn at(
    value: Option<&At<String>>,
    default: u64,
    range: RangeInclusive<u64>,
    key: &str,
    report: &mut Report<'_>,
) -> u64 {
    let Some(value) = value else { return default };
    let limits = format!("{} to {} are possible", show(*range.start()), show(*range.end()));
    let (message, help) = match parse(value.get()) {
        Ok(bytes) if range.contains(&bytes) => return bytes,
        Ok(_) => (format!("{} is out of range", visible(value.get())), limits),
        Err(help) => (format!("`{}` is not a size", visible(value.get())), help),
    };
    report.error(Some(value.span()), key, message, help);
    default
}

/// Bytes of a size.
///
/// # Errors
/// What would be right.
pub fn parse(text: &str) -> Result<u64, String> {
    let general = || "write a number and its unit, such as \"512MiB\" or \"2.5GiB\"".to_owned();
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty()
        || whole.len() > 12
        || !digits(fraction)
        || fraction.len() > 6
        || number.ends_with('.')
    {
        return Err(general());
    }
    let factor = match unit {
        "MiB" => MIB,
        "GiB" => GIB,
        "TiB" => TIB,
        "" => return Err(format!("say the unit too: \"{number}MiB\" or \"{number}GiB\"")),
        other => {
            let unit = match other.trim().chars().next() {
                Some('m' | 'M') => "MiB",
                Some('g' | 'G') => "GiB",
                Some('t' | 'T') => "TiB",
                _ => return Err("units are MiB, GiB and TiB".to_owned()),
            };
            return Err(format!("did you mean \"{number}{unit}\"?"));
        }
    };
    let scale = 10u128.pow(fraction.len() as u32);
    let mantissa: u128 = format!("{whole}{fraction}").parse().map_err(|_| general())?;
    let bytes = u64::try_from(mantissa * u128::from(factor) / scale).map_err(|_| general())?;
    if !bytes.is_multiple_of(MIB) || !(mantissa * u128::from(factor)).is_multiple_of(scale) {
        return Err(format!("sizes are whole MiB: write it as \"{}MiB\"", bytes.div_ceil(MIB)));
    }
    Ok(bytes)
}

/// A size in its largest whole unit.
pub fn show(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= TIB && bytes.is_multiple_of(TIB) => format!("{}TiB", bytes / TIB),
        bytes if bytes >= GIB && bytes.is_multiple_of(GIB) => format!("{}GiB", bytes / GIB),
        bytes => format!("{}MiB", bytes / MIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse("512MiB"), Ok(512 * MIB));
        assert_eq!(parse("2.5GiB"), Ok(2560 * MIB));
        assert_eq!(parse("0.25TiB"), Ok(256 * GIB));
        for wrong in
            ["", "GiB", "4", "4G", "4GB", "4 GiB", ".5GiB", "1.GiB", "1.5MiB", "0.3GiB", "1e3GiB", "-1GiB"]
        {
            parse(wrong).unwrap_err();
        }
        parse("999999999999TiB").unwrap_err();
        assert_eq!(show(2560 * MIB), "2560MiB");
        assert_eq!(show(64 * GIB), "64GiB");
    }
}
