//! Walls between the crates, proved by reading their imports.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A source file of one of the crates, by its path from the top of the repository.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Lines of code: neither comments nor, for pure modules' sake, their tests.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(at, line)| (at + 1, line));
        lines.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    fn code_before_tests(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code().take_while(|(_, line)| !line.starts_with("#[cfg(test)]"))
    }

    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }

    fn header(&self) -> String {
        self.text.lines().take_while(|line| line.starts_with("//!")).collect::<Vec<_>>().join("\n")
    }
}

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository").to_owned()
}

fn sources() -> Vec<Source> {
    let top = top();
    let mut found = Vec::new();
    for root in ["common/src", "server/src", "client/src", "tests/src", "tests/tests"] {
        collect(&top, &top.join(root), &mut found);
    }
    assert!(found.len() > 20, "the sources are not where they should be");
    found
}

fn collect(top: &Path, directory: &Path, found: &mut Vec<Source>) {
    for entry in fs::read_dir(directory).expect("a folder of sources can be listed") {
        let path = entry.expect("a folder of sources can be listed").path();
        if path.is_dir() {
            collect(top, &path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source can be read");
            let path = path.strip_prefix(top).expect("below the top").to_string_lossy().into_owned();
            found.push(Source { path, text });
        }
    }
}

/// `word` stands alone in `line`, not inside a longer one.
fn says(line: &str, word: &str) -> bool {
    let is_part = |byte: Option<&u8>| byte.is_some_and(|&byte| byte.is_ascii_alphanumeric() || byte == b'_');
    line.match_indices(word).any(|(at, _)| {
        let before = at.checked_sub(1).and_then(|at| line.as_bytes().get(at));
        let starts_whole = !word.starts_with(|c: char| c.is_alphanumeric()) || !is_part(before);
        let ends_whole =
            !word.ends_with(|c: char| c.is_alphanumeric()) || !is_part(line.as_bytes().get(at + word.len()));
        starts_whole && ends_whole
    })
}

fn assert_none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

fn lines_saying(sources: &[Source], words: &[&str], allowed: &[&str]) -> Vec<String> {
    let strangers = sources.iter().filter(|source| !source.is_in(allowed));
    strangers
        .flat_map(|source| {
            let lines = source.code().filter(|(_, line)| words.iter().any(|word| says(line, word)));
            lines.map(|(at, line)| format!("{}:{at}: {}", source.path, line.trim()))
        })
        .collect()
}

#[test]
fn every_outside_crate_has_one_home() {
    let sources = sources();
    for (words, homes) in [
        (&["bincode::"][..], &["common/src/wire/codec.rs"][..]),
        (&["quinn::", "quinn_proto::", "rustls::", "rcgen::", "webpki::"], &["common/src/net/", "tests/tests/"]),
        (&["fuser::"], &["client/src/fuse/", "client/src/fuse.rs"]),
        (&["redb::"], &["server/src/", "tests/"]),
    ] {
        let allowed: Vec<&str> = homes.iter().copied().chain(["tests/tests/fast/tidy.rs"]).collect();
        assert_none(&lines_saying(&sources, words, &allowed), &format!("only {homes:?} may say {words:?}"));
    }
}

#[test]
fn the_crates_depend_downwards_only() {
    let sources = sources();
    for (place, forbidden) in [
        ("common/src/", &["holdfast_client", "holdfast_server", "holdfast_tests"][..]),
        ("client/src/", &["holdfast_server", "holdfast_tests"]),
        ("server/src/", &["holdfast_client", "holdfast_tests"]),
        ("server/src/meta/", &["crate::storage", "super::storage::"]),
        ("server/src/storage/", &["crate::meta", "super::meta::"]),
    ] {
        let inside: Vec<Source> =
            sources.iter().filter(|source| source.path.starts_with(place)).map(Source::again).collect();
        assert_none(&lines_saying(&inside, forbidden, &[]), &format!("{place} must not say {forbidden:?}"));
    }
}

impl Source {
    fn again(&self) -> Self {
        Self { path: self.path.clone(), text: self.text.clone() }
    }
}

#[test]
fn what_calls_itself_pure_is_pure() {
    let impure = [
        "tokio",
        "SystemTime::now",
        "Instant::now",
        "HashMap",
        "HashSet",
        "rand",
        "std::fs",
        "std::env",
        "std::thread",
        "std::net::UdpSocket",
    ];
    let mut found = Vec::new();
    let mut pure = 0;
    for source in sources().iter().filter(|source| says(&source.header(), "Pure")) {
        pure += 1;
        let lines = source.code_before_tests().filter(|(_, line)| impure.iter().any(|word| says(line, word)));
        found.extend(lines.map(|(at, line)| format!("{}:{at}: {}", source.path, line.trim())));
    }
    assert!(pure >= 8, "only {pure} modules call themselves pure: has the word changed?");
    assert_none(&found, "a pure module knows no runtime, clock, chance, environment or hash order");
}

#[test]
fn nothing_is_left_for_later() {
    let unfinished = ["TODO", "FIXME", "XXX", "todo!", "unimplemented!", "dbg!"];
    let found: Vec<String> = sources()
        .iter()
        .filter(|source| source.path != "tests/tests/fast/tidy.rs")
        .flat_map(|source| {
            let lines = source.text.lines().enumerate();
            let bad = lines.filter(|(_, line)| unfinished.iter().any(|word| says(line, word)));
            bad.map(|(at, line)| format!("{}:{}: {}", source.path, at + 1, line.trim())).collect::<Vec<_>>()
        })
        .collect();
    assert_none(&found, "finish it, or open an issue");
}

#[test]
fn every_module_says_what_it_owns() {
    let silent: Vec<String> = sources()
        .iter()
        .filter(|source| source.header().is_empty() && !source.path.ends_with("/tests.rs"))
        .map(|source| source.path.clone())
        .collect();
    assert_none(&silent, "the first line of a module is `//! ...`");
}

#[test]
fn unsafe_code_is_fenced_in_with_a_reason() {
    let loose: Vec<String> = sources()
        .iter()
        .filter(|source| source.code().any(|(_, line)| says(line, "unsafe") && line.contains('{')))
        .filter(|source| !source.text.contains("(unsafe_code, reason = "))
        .map(|source| source.path.clone())
        .collect();
    assert_none(&loose, "`unsafe` needs a module with #[allow(unsafe_code, reason = ...)]");
}

#[test]
fn every_sentence_about_semantics_stands_over_a_test() {
    let page = fs::read_to_string(top().join("docs/semantics.md")).expect("the page can be read");
    let (promised, _differs) = page.split_once("## What differs").expect("the page has both parts");
    let sentences: Vec<&str> = promised.lines().filter_map(|line| line.strip_prefix("- ")).collect();
    assert!(sentences.len() > 30, "the page has lost its sentences");
    let sources = sources();
    for sentence in sentences {
        let quoted = format!("/// \"{sentence}\"\n");
        let over_a_test = |source: &Source| {
            source.text.split(&quoted).skip(1).any(|rest| {
                let attribute = rest.lines().find(|line| !line.starts_with("///"));
                attribute == Some("#[test]")
            })
        };
        assert!(sources.iter().any(over_a_test), "no test is under: {sentence}");
    }
}
