//! Text that other programs wrote, before it is shown or kept.

/// One line of it, as it would stand there in the end: what was written over by a carriage return is gone, and so are
/// colours and whatever else acts on a terminal (ECMA-48).
pub fn line(text: &str) -> String {
    let plain = anstream::adapter::strip_str(text.trim_end()).to_string();
    let last = plain.rsplit('\r').find(|part| !part.trim().is_empty()).unwrap_or_default();
    last.chars().filter(|c| !c.is_control() || *c == '\t').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_gone_whole() {
        for (text, shown) in [
            ("plain\n", "plain"),
            ("a\tb  \r\n", "a\tb"),
            ("\x1b[1;32mok\x1b[0m done\n", "ok done"),
            ("10 %\r50 %\r100 %\r\n", "100 %"),
            ("\x1b]0;a title\x07seen\n", "seen"),
            ("\x1b]52;c;cGFzdGU=\x1b\\seen\n", "seen"),
            ("bell\x07\x08\n", "bell"),
            ("\x1b[2J\x1b[H\n", ""),
        ] {
            assert_eq!(line(text), shown, "{text:?}");
        }
    }
}
