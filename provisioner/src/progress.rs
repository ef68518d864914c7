//! What is going on, on standard error: a line a node with a spinner on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::say::say;

/// Where progress is told.
#[derive(Clone)]
pub struct Progress {
    bars: Option<MultiProgress>,
    quiet: bool,
}

impl Progress {
    /// Spinners if standard error is a terminal; nothing but failures if `quiet`.
    pub fn new(quiet: bool) -> Self {
        let bars = (!quiet && std::io::stderr().is_terminal()).then(MultiProgress::new);
        Self { bars, quiet }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        match &self.bars {
            Some(bars) => drop(bars.println(line)),
            None if !self.quiet => say(line),
            None => {}
        }
    }

    /// A line that stays, even when quiet: something the user has to know.
    pub fn warn(&self, line: &str) {
        match &self.bars {
            Some(bars) => drop(bars.println(format!("warning: {line}"))),
            None => say(format_args!("warning: {line}")),
        }
    }

    /// Something begins: `subject` is a node's name, or the lab's; `what` says what is done ("boot").
    pub fn begin(&self, subject: &str, what: &str) -> Task {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix:12} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.set_prefix(subject.to_string());
            bar.set_message(what.to_string());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Task {
            progress: self.clone(),
            bar,
            subject: subject.into(),
            what: what.into(),
            since: Instant::now(),
        }
    }
}

/// Something that goes on.
pub struct Task {
    progress: Progress,
    bar: Option<ProgressBar>,
    subject: String,
    what: String,
    since: Instant,
}

impl Task {
    /// Shows what it is at; on a terminal only.
    pub fn detail(&self, detail: &str) {
        if let Some(bar) = &self.bar {
            let short: String = detail.chars().filter(|c| !c.is_control()).take(60).collect();
            bar.set_message(format!("{}: {short}", self.what));
        }
    }

    /// Something about it that the user has to know.
    pub fn warn(&self, line: &str) {
        self.progress.warn(&format!("{}: {line}", self.subject));
    }

    /// It ended well.
    pub fn done(self) {
        self.end("✓", "");
    }

    /// It failed; the error itself is told at the end.
    pub fn failed(self) {
        self.end("✗", " failed");
    }

    fn end(&self, mark: &str, suffix: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.since.elapsed().as_secs_f64();
        self.progress.say(&format!("{mark} {:12} {}{suffix} ({seconds:.1} s)", self.subject, self.what));
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
