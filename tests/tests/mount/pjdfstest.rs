//! The POSIX suite of the crates.io `pjdfstest`; what does not pass yet is listed by name in a file that may only shrink.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use holdfast_tests::{
    cluster::{self, Cluster},
    shell, sys,
};

const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
utime_now = {}
utimensat = {}
rename_ctime = {}
stat_st_birthtime = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["tests", "tests"]]
"#;

/// Cases that do not pass yet, one a line; `#` begins a comment.
fn exceptions() -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("pjdfstest-exceptions.txt");
    let text = fs::read_to_string(path).expect("read the exceptions");
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).map(Into::into).collect()
}

/// Name and result from lines like `chmod::errno::eperm      ok`.
fn results(output: &str) -> Vec<(String, String)> {
    let words = output.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    words
        .filter(|words| words.len() == 2 && words[0].contains("::"))
        .map(|words| (words[0].into(), words[1].into()))
        .collect()
}

/// "Every case of pjdfstest passes, as root and as two other users."
#[test]
fn every_case_of_pjdfstest_passes_but_those_that_are_listed() {
    if !shell::has("pjdfstest") || !sys::is_root() {
        eprintln!("SKIPPED: pjdfstest is not installed (scripts/test does that), or this is not root");
        return;
    }
    let (cluster, outside) = (Cluster::start(), cluster::temp_dir());
    let mount = cluster.mount_with(&["allow_other,default_permissions,suid,dev"]);
    fs::write(outside.path().join("pjd.toml"), CONFIGURATION).expect("write the configuration");
    shell::run(mount.path(), "mkdir -p suite && chmod 777 suite");
    shell::run(outside.path(), "mkdir -p second && chmod 777 . second");
    let script = format!("pjdfstest -c pjd.toml -p {}/suite -s second 2>&1 || true", mount.path().display());
    let output = shell::attempt(outside.path(), &script, Duration::from_secs(300));
    let said = String::from_utf8_lossy(&output.stdout);
    let exceptions = exceptions();
    let (mut failed, mut passed) = (BTreeSet::new(), BTreeSet::new());
    for (name, result) in results(&said) {
        match result.as_str() {
            "ok" => passed.insert(name),
            "FAILED" => failed.insert(name),
            _ => false,
        };
    }
    assert!(passed.len() > 300, "the suite did not run:\n{said}");
    let new: Vec<_> = failed.difference(&exceptions).collect();
    assert!(new.is_empty(), "{} cases fail and are not listed: {new:#?}\n{said}", new.len());
    let stale: Vec<_> = exceptions.intersection(&passed).collect();
    assert!(stale.is_empty(), "these pass now, so take them off the list: {stale:#?}");
}
