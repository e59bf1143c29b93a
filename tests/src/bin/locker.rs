//! A program that opens, locks, reads and writes files as it is told, line by line: locks belong to processes, so tests of locks need
//! more of them. Each line is answered by one: `ok`, `ok VALUE`, or the errno.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, BufRead, Write},
    os::unix::fs::FileExt,
};

use holdfast_tests::sys;

fn main() -> io::Result<()> {
    let mut files = Files::default();
    for line in io::stdin().lock().lines() {
        let line = line?;
        let answer = match files.obey(&line) {
            Ok(value) if value.is_empty() => "ok".to_owned(),
            Ok(value) => format!("ok {value}"),
            Err(error) => error.raw_os_error().map_or_else(|| error.to_string(), |errno| errno.to_string()),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

#[derive(Default)]
struct Files(HashMap<String, File>);

fn number<T: std::str::FromStr>(word: &str) -> io::Result<T> {
    word.parse().map_err(|_| io::Error::other(format!("not a number: {word}")))
}

impl Files {
    fn file(&self, name: &str) -> io::Result<&File> {
        self.0.get(name).ok_or_else(|| io::Error::other("no such file"))
    }

    /// open NAME PATH | dup NAME AS | close NAME | flock NAME OPERATION | setlk NAME COMMAND KIND FIRST LENGTH | getlk ... |
    /// read NAME OFFSET LENGTH | write NAME OFFSET TEXT | alarm MS again|once | pid
    fn obey(&mut self, line: &str) -> io::Result<String> {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["open", name, path] => {
                let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
                self.0.insert(name.to_owned(), file);
            }
            ["dup", name, other] => {
                let file = self.file(name)?.try_clone()?;
                self.0.insert(other.to_owned(), file);
            }
            ["close", name] => drop(self.0.remove(name)),
            ["flock", name, operation] => sys::flock(self.file(name)?, number(operation)?)?,
            ["setlk" | "getlk", name, command, kind, first, length] => {
                let lock = libc::flock {
                    l_type: number(kind)?,
                    l_whence: 0,
                    l_start: number(first)?,
                    l_len: number(length)?,
                    l_pid: 0,
                };
                let found = sys::fcntl_lock(self.file(name)?, number(command)?, lock)?;
                if words[0] == "getlk" {
                    return Ok(format!("{} {} {} {}", found.l_type, found.l_start, found.l_len, found.l_pid));
                }
            }
            ["read", name, offset, length] => {
                let mut bytes = vec![0; number(length)?];
                let count = self.file(name)?.read_at(&mut bytes, number(offset)?)?;
                bytes.truncate(count);
                return Ok(String::from_utf8_lossy(&bytes).into_owned());
            }
            ["write", name, offset, text] => self.file(name)?.write_all_at(text.as_bytes(), number(offset)?)?,
            ["alarm", delay, how] => sys::alarm(number(delay)?, how == "again")?,
            ["pid"] => return Ok(std::process::id().to_string()),
            _ => return Err(io::Error::other("what?")),
        }
        Ok(String::new())
    }
}
