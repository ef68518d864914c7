//! Work that notices what goes wrong with the nodes it runs on: a stream of numbers from a to b, a synced journal on a, and
//! a watch on a's clocks. For labs of two nodes a and b of the image tiny.

use std::time::{Duration, SystemTime};

use crate::{TestLab, waiting::Waiting};

/// On a: sends numbers to b, writes a synced journal, and watches both clocks.
const WORK_A: &str = r#"
rm -f /root/journal
(i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done </dev/null 2>/dev/null | nc b 7000 >/dev/null 2>&1) &
(i=0; while :; do i=$((i+1)); echo "$i $(echo $i | md5sum)" >>/root/journal; sync; echo $i >/tmp/s; mv /tmp/s /tmp/synced; sleep 0.1; done) >/dev/null 2>&1 </dev/null &
(w=0 m=0; while :; do
    t=$(date +%s); [ $t -ge $w ] || echo "wall clock: $w, then $t" >>/tmp/back; w=$t
    read u _ </proc/uptime; u=${u%.*}; [ $u -ge $m ] || echo "uptime: $m, then $u" >>/tmp/back
    [ $((u - m)) -lt 15 ] || [ $m = 0 ] || echo "uptime: a leap from $m to $u" >>/tmp/back; m=$u
    sleep 0.2
done) >/dev/null 2>&1 </dev/null &
"#;

/// On b: keeps what a sends, and never says that it has nothing to say, which would end it.
const WORK_B: &str = "(sleep 100000 </dev/null 2>/dev/null | nc -l -p 7000 >/tmp/got 2>/dev/null) &";

/// The work in a lab, or in a fork of it.
pub struct Load<'l> {
    lab: &'l TestLab,
    fork: Option<String>,
}

impl<'l> Load<'l> {
    /// That in the lab.
    pub fn of(lab: &'l TestLab) -> Self {
        Self { lab, fork: None }
    }

    /// That in a fork.
    pub fn of_fork(lab: &'l TestLab, number: u32) -> Self {
        Self { lab, fork: Some(number.to_string()) }
    }

    /// Begins, on nodes that have just been booted.
    pub fn start(&self) {
        self.ask("b", WORK_B);
        self.ask("a", WORK_A);
        self.wait_for_more(5);
    }

    /// Runs a shell command in a node; what it wrote.
    pub fn ask(&self, node: &str, script: &str) -> String {
        let fork = self.fork.as_deref().map(|number| ["--fork", number]);
        let fork = fork.as_ref().map_or(&[][..], |fork| fork);
        let words = [fork, &["exec", node, "sh", "-c", script]].concat();
        self.lab.run(&words).trim().into()
    }

    /// What a node reports: lines of a name, `=` and a value.
    fn report(&self, node: &str, script: &str) -> impl Fn(&str) -> String + use<> {
        let said = self.ask(node, script);
        move |name| {
            let value = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_else(|| panic!("no {name} in {said}")).to_owned()
        }
    }

    /// How many numbers have come to b.
    pub fn got(&self) -> u64 {
        self.ask("b", "wc -l </tmp/got").parse().unwrap_or(0)
    }

    /// Waits until b has got more numbers than `count`.
    pub fn wait_for_more(&self, count: u64) -> u64 {
        let mut waiting = Waiting::new("more numbers in b", Duration::from_secs(120));
        loop {
            let got = self.got();
            if got > count {
                return got;
            }
            let over = waiting.is_over(&format!("{got}, and no more than {count}"));
            assert!(!over, "b has got {got} numbers, and no more than {count} in two minutes");
        }
    }

    /// What must hold at any time: no number was lost or came twice, what was synced is there, no clock went back, and it
    /// is now. Returns how far it is.
    pub fn check(&self) -> Progress {
        let before = now_s();
        let b = self.report(
            "b",
            "echo gap=$(awk '$1 != NR { print NR \": \" $0; exit }' /tmp/got); echo got=$(wc -l </tmp/got); echo now=$(date +%s)",
        );
        assert_eq!(b("gap"), "", "the stream has a gap");
        let a = self.report("a", &format!(
            "echo synced=$(cat /tmp/synced); {JOURNAL} echo back=$(head -n 1 /tmp/back 2>/dev/null); echo now=$(date +%s)"
        ));
        let after = now_s();
        let number = |text: String| text.parse::<u64>().unwrap_or(0);
        let (synced, written) = (number(a("synced")), number(a("written")));
        assert_eq!(a("wrong"), "", "the journal is damaged");
        assert!(synced > 0 && written >= synced, "{synced} lines were synced, {written} are there");
        assert_eq!(a("back"), "", "a clock went back");
        for (node, there) in [("a", number(a("now"))), ("b", number(b("now")))] {
            assert!(
                (before - 2..=after + 2).contains(&there),
                "{node}'s clock says {there} from {before} to {after}"
            );
        }
        Progress { synced, written, got: number(b("got")) }
    }

    /// The journal alone: how many lines it has.
    pub fn check_journal(&self) -> u64 {
        let a = self.report("a", JOURNAL);
        assert_eq!(a("wrong"), "", "the journal is damaged");
        a("written").parse().unwrap_or(0)
    }
}

/// How far the work is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Lines of the journal that are known to be on the disk.
    pub synced: u64,
    /// Lines that it has.
    pub written: u64,
    /// Numbers that have come to b.
    pub got: u64,
}

/// The journal's lines are whole and in order, but for the last, at which it may have been cut off. Checksums take long
/// there, so only those of the last lines are looked at.
const JOURNAL: &str = r#"echo written=$(wc -l </root/journal); echo wrong=$(sed '$d' /root/journal | awk '$1 != NR { print NR ": " $0; exit }'
sed '$d' /root/journal | tail -n 20 | while read i sum _; do [ "$sum" = "$(echo $i | md5sum | cut -d' ' -f1)" ] || echo "$i $sum"; done);"#;

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}
