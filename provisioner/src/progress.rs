//! What is going on, on standard error: a line a node with a spinner on a terminal, plain lines elsewhere: one when
//! something ends, and one every half a minute while it goes on, since who waits for a silent program may end it.

use std::{
    convert::Infallible,
    io::IsTerminal,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::{say::say, terminal_text};

/// Time between two lines about something that goes on, where there is no terminal.
const INTERVAL: Duration = Duration::from_secs(30);
/// How many characters of a detail are shown on a terminal, and elsewhere.
const SHOWN: [usize; 2] = [60, 200];

/// Where progress is told.
#[derive(Clone)]
pub struct Progress {
    way: Way,
}

#[derive(Clone)]
enum Way {
    Quiet,
    Bars(MultiProgress),
    Lines(Arc<Lines>),
}

impl Progress {
    /// Spinners if standard error is a terminal; nothing but failures if `quiet`.
    pub fn new(quiet: bool) -> Self {
        let way = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Way::Quiet,
            (false, true) => Way::Bars(MultiProgress::new()),
            (false, false) => Way::Lines(Arc::new(Lines::new(INTERVAL, |line| say(line)))),
        };
        Self { way }
    }

    /// Whether nothing but failures is to be told.
    pub fn is_quiet(&self) -> bool {
        matches!(self.way, Way::Quiet)
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        match &self.way {
            Way::Quiet => {}
            Way::Bars(bars) => drop(bars.println(line)),
            Way::Lines(lines) => (lines.ongoing.write)(line),
        }
    }

    /// A line that stays, even when quiet: something the user has to know.
    pub fn warn(&self, line: &str) {
        match &self.way {
            Way::Quiet => say(format_args!("warning: {line}")),
            _ => self.say(&format!("warning: {line}")),
        }
    }

    /// Something begins: `subject` is a node's name, or the lab's; `what` says what is done ("boot").
    pub fn begin(&self, subject: &str, what: &str) -> Task {
        let bar = match &self.way {
            Way::Bars(bars) => Some(bars.add(ProgressBar::new_spinner())),
            _ => None,
        };
        if let Some(bar) = &bar {
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix:12} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.set_prefix(subject.to_string());
            bar.set_message(what.to_string());
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        let running = Arc::new(Running {
            subject: subject.into(),
            what: what.into(),
            since: Instant::now(),
            last: Mutex::default(),
        });
        if let Way::Lines(lines) = &self.way {
            lines.add(&running);
        }
        Task { progress: self.clone(), bar, running }
    }
}

/// Something that goes on.
pub struct Task {
    progress: Progress,
    bar: Option<ProgressBar>,
    running: Arc<Running>,
}

impl Task {
    /// What it is at: shown on a terminal at once, elsewhere with its next line.
    pub fn detail(&self, detail: &str) {
        *lock(&self.running.last) = detail.into();
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {}", self.running.what, short(detail, SHOWN[0])));
        }
    }

    /// Something about it that the user has to know.
    pub fn warn(&self, line: &str) {
        self.progress.warn(&format!("{}: {line}", self.running.subject));
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
        self.stop();
        let Running { subject, what, since, .. } = &*self.running;
        let seconds = since.elapsed().as_secs_f64();
        self.progress.say(&format!("{mark} {subject:12} {what}{suffix} ({seconds:.1} s)"));
    }

    /// From here on it is no longer told that it goes on.
    fn stop(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if let Way::Lines(lines) = &self.progress.way {
            lock(&lines.ongoing.tasks).retain(|(task, _)| !Arc::ptr_eq(task, &self.running));
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A task as others see it.
struct Running {
    subject: String,
    what: String,
    since: Instant,
    /// What it was last at; empty: nothing is known.
    last: Mutex<String>,
}

/// Plain lines, and the thread that tells what goes on. It begins with the first task, and ends with this.
struct Lines {
    ongoing: Arc<Ongoing>,
    ticker: OnceLock<Sender<Infallible>>,
}

/// What the ticker looks at.
struct Ongoing {
    interval: Duration,
    write: Box<dyn Fn(&str) + Send + Sync>,
    /// Each task, and when it is told next.
    tasks: Mutex<Vec<(Arc<Running>, Instant)>>,
}

impl Lines {
    fn new(interval: Duration, write: impl Fn(&str) + Send + Sync + 'static) -> Self {
        let ongoing = Ongoing { interval, write: Box::new(write), tasks: Mutex::default() };
        Self { ongoing: Arc::new(ongoing), ticker: OnceLock::new() }
    }

    fn add(&self, task: &Arc<Running>) {
        let due = task.since + self.ongoing.interval;
        lock(&self.ongoing.tasks).push((task.clone(), due));
        self.ticker.get_or_init(|| {
            let (ticker, ended) = channel();
            let ongoing = self.ongoing.clone();
            // A host that has no thread left has worse to tell than this.
            drop(std::thread::Builder::new().name("ticker".into()).spawn(move || ongoing.tell(&ended)));
            ticker
        });
    }
}

impl Ongoing {
    /// Tells of the tasks, each when it is due, until nobody is left who could begin one.
    fn tell(&self, ended: &Receiver<Infallible>) {
        // What begins meanwhile is due later than that.
        let mut next = Instant::now() + self.interval;
        while ended.recv_timeout(next.saturating_duration_since(Instant::now()))
            == Err(RecvTimeoutError::Timeout)
        {
            let now = Instant::now();
            next = now + self.interval;
            // Held while it is told: of what has ended, nothing is told any more.
            for (task, due) in lock(&self.tasks).iter_mut() {
                if *due <= now {
                    (self.write)(&ongoing(
                        &task.subject,
                        &task.what,
                        task.since.elapsed(),
                        &lock(&task.last),
                    ));
                    *due = now + self.interval;
                }
                next = next.min(*due);
            }
        }
    }
}

/// The line about something that goes on: `  NODE         WHAT: 90 s: LAST LINE`.
fn ongoing(subject: &str, what: &str, elapsed: Duration, last: &str) -> String {
    let line = format!("  {subject:12} {what}: {} s", elapsed.as_secs());
    match short(last, SHOWN[1]).trim() {
        "" => line,
        last => format!("{line}: {last}"),
    }
}

/// As much of a foreign text as is shown.
fn short(text: &str, most: usize) -> String {
    terminal_text::line(text).chars().take(most).collect()
}

/// A thread that panicked has left nothing behind that could be half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than any line takes to come.
    const LIMIT: Duration = Duration::from_secs(60);

    fn progress() -> (Progress, Receiver<String>) {
        let (lines, said) = channel();
        let write = move |line: &str| drop(lines.send(line.to_owned()));
        let lines = Lines::new(Duration::from_millis(20), write);
        (Progress { way: Way::Lines(Arc::new(lines)) }, said)
    }

    /// The next line that has this in it.
    fn next(said: &Receiver<String>, text: &str) -> String {
        let end = Instant::now() + LIMIT;
        let mut line = String::new();
        while !line.contains(text) {
            line = said.recv_timeout(end.saturating_duration_since(Instant::now())).unwrap();
        }
        line
    }

    #[test]
    fn a_line_is_one_line_and_not_too_long() {
        let told = |seconds: u64, last: &str| {
            ongoing("master", "kubernetes/init", Duration::from_millis(seconds * 1000 + 999), last)
        };
        assert_eq!(told(30, ""), "  master       kubernetes/init: 30 s");
        assert_eq!(told(30, " \n\t"), told(30, ""));
        assert_eq!(told(90, "50 %\r\x1b[1m100 %\n"), "  master       kubernetes/init: 90 s: 100 %");
        assert_eq!(told(90, &"ä".repeat(9999)).chars().count(), told(90, "").chars().count() + 2 + SHOWN[1]);
        let long = ongoing("a-name-that-is-long", "boot", Duration::from_secs(120), "x");
        assert_eq!(long, "  a-name-that-is-long boot: 120 s: x");
    }

    #[test]
    fn what_goes_on_is_told_until_it_ends() {
        let (progress, said) = progress();
        let (one, other) = (progress.begin("a", "boot"), progress.begin("b", "step/x"));
        assert!(next(&said, "boot").starts_with("  a            boot: "));
        other.detail("first");
        other.detail("second");
        let line = next(&said, "second");
        assert!(line.starts_with("  b            step/x: ") && line.ends_with(" s: second"), "{line}");
        one.done();
        next(&said, "✓ a            boot (");
        // The other one has had its turn twice, so this one would have had one.
        for _ in 0..2 {
            let line = said.recv_timeout(LIMIT).unwrap();
            assert!(line.starts_with("  b "), "{line}");
        }
        other.failed();
        next(&said, "✗ b            step/x failed (");
        // One that is given up is not told of either.
        drop(progress.begin("c", "given up"));
        let last = progress.begin("d", "last");
        for _ in 0..2 {
            let line = said.recv_timeout(LIMIT).unwrap();
            assert!(line.starts_with("  d "), "{line}");
        }
        drop(last);
    }

    #[test]
    fn the_ticker_ends_with_its_progress() {
        let (progress, said) = progress();
        let task = progress.begin("a", "boot");
        drop(progress);
        next(&said, "boot");
        drop(task);
        let end = Instant::now() + LIMIT;
        // The ticker has the other end of it.
        while said.recv_timeout(end.saturating_duration_since(Instant::now()))
            != Err(RecvTimeoutError::Disconnected)
        {
            assert!(Instant::now() < end);
        }
    }

    #[test]
    fn nothing_is_told_when_quiet() {
        assert!(matches!(Progress::new(true).way, Way::Quiet));
    }
}
