//! What happened to the cluster, for people: kept in memory and in a file beside the tables, one JSON object a line.
//!
//! It belongs to this server and not to the replicated state: nothing is decided by it, and a power cut may take its last lines.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use holdfast_common::{
    Time,
    disk::{Disk, DiskFile},
    limits::{JOURNAL_PAGE_MAX, JOURNAL_TEXT_MAX},
    wire::meta::{JournalEntry, Severity},
};

const FILE: &str = "events.jsonl";
/// What the file becomes when it is full.
const OLDER: &str = "events.1.jsonl";
/// Bytes of one file.
const FILE_LENGTH_MAX: u64 = 4 << 20;
/// Entries that are kept in memory.
const KEPT_MAX: usize = 4096;
/// Seconds in which what happens to one part of the cluster again and again is told once.
const RARELY_SECS: i64 = 10;

/// What there is to say about one thing that happened.
#[derive(Debug)]
pub struct Note {
    pub severity: Severity,
    pub place: String,
    pub what: String,
    /// Empty: none.
    pub consequence: String,
    /// Empty: none.
    pub action: String,
}

impl Note {
    pub fn new(severity: Severity, place: impl Into<String>, what: impl Into<String>) -> Self {
        let (consequence, action) = Default::default();
        Self { severity, place: place.into(), what: what.into(), consequence, action }
    }

    #[must_use]
    pub fn meaning(self, consequence: impl Into<String>) -> Self {
        Self { consequence: consequence.into(), ..self }
    }

    #[must_use]
    pub fn doing(self, action: impl Into<String>) -> Self {
        Self { action: action.into(), ..self }
    }
}

#[derive(Debug)]
pub struct Journal {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    /// Where the next line goes. `None`: the file cannot be used.
    file: Option<(Arc<dyn DiskFile>, u64)>,
    kept: VecDeque<JournalEntry>,
    next: u64,
    /// When what may happen often was told last, in seconds since 1970, by its place.
    often: BTreeMap<String, i64>,
}

impl Journal {
    /// Takes up the journal of `directory`, or begins one. Without its file it is kept in memory alone.
    pub fn open(disk: Arc<dyn Disk>, directory: &Path) -> Self {
        let (kept, often) = Default::default();
        let mut journal = Self { disk, directory: directory.to_owned(), file: None, kept, next: 1, often };
        for name in [OLDER, FILE] {
            if let Err(error) = journal.load(name) {
                tracing::warn!(%error, name, "a journal of events cannot be read");
            }
        }
        journal.file = journal.begin().inspect_err(|error| tracing::warn!(%error, "events are not kept")).ok();
        journal
    }

    fn load(&mut self, name: &str) -> io::Result<()> {
        let file = match self.disk.open(&self.directory.join(name), false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        // Longer than it can be made only by somebody else.
        let length = file.length()?.min(2 * FILE_LENGTH_MAX);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)?;
        // A line that does not parse was cut off by a loss of power.
        let lines = bytes.split(|byte| *byte == b'\n');
        lines.filter_map(|line| serde_json::from_slice(line).ok()).for_each(|entry| self.keep(entry));
        Ok(())
    }

    fn begin(&self) -> io::Result<(Arc<dyn DiskFile>, u64)> {
        let file = self.disk.open(&self.directory.join(FILE), true)?;
        let length = file.length()?;
        if length > 0 {
            // Ends a line that was cut off.
            file.write_all_at(b"\n", length)?;
        }
        let length = file.length()?;
        Ok((file, length))
    }

    fn keep(&mut self, entry: JournalEntry) {
        self.next = self.next.max(entry.number + 1);
        self.kept.push_back(entry);
        if self.kept.len() > KEPT_MAX {
            self.kept.pop_front();
        }
    }

    /// Adds an entry. A file that cannot be written is not tried again.
    pub fn add(&mut self, time: Time, note: Note) {
        let Note { severity, place, what, consequence, action } = note;
        let [place, what, consequence, action] = [place, what, consequence, action].map(shortened);
        let entry = JournalEntry { number: self.next, time, severity, place, what, consequence, action };
        if let Err(error) = self.write(&entry) {
            tracing::warn!(%error, "events are no longer kept");
            self.file = None;
        }
        self.keep(entry);
    }

    /// Adds an entry about something that may happen often, unless there has been one about its place a moment ago.
    pub fn add_rarely(&mut self, time: Time, note: Note) {
        self.often.retain(|_, last| (0..RARELY_SECS).contains(&(time.secs - *last)));
        if !self.often.contains_key(&note.place) {
            self.often.insert(note.place.clone(), time.secs);
            self.add(time, note);
        }
    }

    fn write(&mut self, entry: &JournalEntry) -> io::Result<()> {
        let Some((file, length)) = &mut self.file else { return Ok(()) };
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        file.write_all_at(&line, *length)?;
        *length += line.len() as u64;
        if *length >= FILE_LENGTH_MAX {
            self.disk.rename(&self.directory.join(FILE), &self.directory.join(OLDER))?;
            self.file = Some(self.begin()?);
        }
        Ok(())
    }

    /// The first entries after `number` that are in memory.
    pub fn after(&self, number: u64) -> Vec<JournalEntry> {
        let first = self.kept.partition_point(|entry| entry.number <= number);
        self.kept.iter().skip(first).take(JOURNAL_PAGE_MAX).cloned().collect()
    }
}

fn shortened(mut text: String) -> String {
    let end = (0..=JOURNAL_TEXT_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.truncate(end);
    text
}

#[cfg(test)]
mod tests {
    use holdfast_common::disk::RealDisk;

    use super::*;

    fn note(text: &str) -> Note {
        Note::new(Severity::Info, "here", text).meaning("little").doing("nothing")
    }

    fn texts(journal: &Journal) -> Vec<(u64, String)> {
        journal.after(0).into_iter().map(|entry| (entry.number, entry.what)).collect()
    }

    #[test]
    fn it_outlives_its_process_and_a_line_that_was_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Journal::open(Arc::new(RealDisk), directory.path());
        let mut journal = open();
        ["one", "two"].into_iter().for_each(|text| journal.add(Time::default(), note(text)));
        let file = directory.path().join(FILE);
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() - 5]).unwrap();
        let mut journal = open();
        assert_eq!(texts(&journal), [(1, "one".to_owned())]);
        journal.add(Time::default(), note("three"));
        assert_eq!(texts(&open()), [(1, "one".to_owned()), (2, "three".to_owned())]);
    }

    #[test]
    fn what_happens_often_is_told_once_in_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(Arc::new(RealDisk), directory.path());
        for (secs, place) in [(1, "a"), (2, "a"), (2, "b"), (10, "a"), (11, "a"), (5, "a")] {
            journal.add_rarely(Time { secs, nanos: 0 }, Note::new(Severity::Info, place, secs.to_string()));
        }
        let told: Vec<String> = texts(&journal).into_iter().map(|(_, text)| text).collect();
        assert_eq!(told, ["1", "2", "11", "5"], "the last after the clock was set back");
    }

    #[test]
    fn it_is_bounded_in_memory_and_on_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(Arc::new(RealDisk), directory.path());
        let long = "ä".repeat(JOURNAL_TEXT_MAX);
        (0..KEPT_MAX + 3000).for_each(|_| journal.add(Time::default(), note(&long)));
        assert_eq!(journal.after(0).first().map(|entry| entry.number), Some(3001));
        assert_eq!(journal.after(0)[0].what.len(), JOURNAL_TEXT_MAX);
        assert_eq!(journal.after(0).len(), JOURNAL_PAGE_MAX);
        assert_eq!(journal.after(KEPT_MAX as u64 + 2999).len(), 1);
        let bytes: u64 = std::fs::read_dir(&directory).unwrap().map(|it| it.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= 2 * FILE_LENGTH_MAX + (8 << 10), "{bytes}");
        let again = Journal::open(Arc::new(RealDisk), directory.path());
        assert_eq!(again.after(KEPT_MAX as u64 + 2999), journal.after(KEPT_MAX as u64 + 2999));
    }
}
