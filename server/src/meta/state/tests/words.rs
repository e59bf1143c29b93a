//! Namespace operations as tables of words.

use holdfast_common::{
    Attr, Ino, Kind, Refusal, Time,
    wire::meta::{Mutated, NewInode, Op, RenameMode, SetAttr, SetTime, XattrMode},
};

use super::{BTreeMap, World, query};

/// Runs lines `operation => answer`, and checks every invariant after each.
///
/// A path is `/a/b`, or `@x/b` where `keep x /a` was said before. Answers: `ok`, a refusal's name, or, for `stat`,
/// fields to compare.
fn check(script: &str) {
    let mut shell = Shell { world: World::new(), kept: BTreeMap::new() };
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (operation, expected) = line.split_once(" => ").unwrap_or((line, "ok"));
        let words: Vec<&str> = operation.split_whitespace().collect();
        let answer = match shell.run(&words, expected) {
            Ok(answer) => answer,
            Err(refusal) => format!("{refusal:?}"),
        };
        assert_eq!(answer, expected, "{line}");
        shell.world.check();
    }
}

struct Shell {
    world: World,
    kept: BTreeMap<String, Ino>,
}

impl Shell {
    fn ino(&self, path: &str) -> Result<Ino, Refusal> {
        let mut parts = path.split('/');
        let mut at = match parts.next() {
            Some(name) if name.starts_with('@') => self.kept[&name[1..]],
            _ => Ino::ROOT,
        };
        for name in parts.filter(|name| !name.is_empty()) {
            at = self.world.ask(|view| query::lookup(view, at, name.as_bytes()))?.ino;
        }
        Ok(at)
    }

    fn place(&self, path: &str) -> Result<(Ino, Vec<u8>), Refusal> {
        let (parent, name) = path.rsplit_once('/').unwrap();
        Ok((self.ino(parent)?, name.replace("LONG", &"n".repeat(255)).into_bytes()))
    }

    fn op(&self, words: &[&str]) -> Result<Op, Refusal> {
        let rename = |mode| {
            let ((from, from_name), (to, to_name)) = (self.place(words[1])?, self.place(words[2])?);
            Ok(Op::Rename { from, from_name, to, to_name, mode })
        };
        let make = |kind, target: &str| {
            let (parent, name) = self.place(words[1])?;
            let mode = words.get(2).and_then(|mode| u32::from_str_radix(mode, 8).ok()).unwrap_or(0o644);
            let new = NewInode { kind, mode, uid: 10, gid: 20, rdev: 0, target: target.into() };
            Ok(Op::Make { parent, name, new, exclusive: words[0] != "open", open: false })
        };
        let number = |at: usize| words[at].parse().unwrap();
        let octal = |at: usize| u32::from_str_radix(words[at], 8).unwrap();
        let set = |set| Ok(Op::SetAttr { ino: self.ino(words[1])?, set });
        let xattr = |mode| {
            let (name, value) = (words[2].as_bytes().to_vec(), words[3].as_bytes().to_vec());
            Ok(Op::SetXattr { ino: self.ino(words[1])?, name, value, mode })
        };
        let none = SetAttr::default();
        match words[0] {
            "create" | "open" => make(Kind::File, ""),
            "mkdir" => make(Kind::Directory, ""),
            "mkfifo" => make(Kind::Fifo, ""),
            "symlink" => make(Kind::Symlink, words[2]),
            "link" => {
                let (parent, name) = self.place(words[2])?;
                Ok(Op::Link { ino: self.ino(words[1])?, parent, name })
            }
            "unlink" => self.place(words[1]).map(|(parent, name)| Op::Unlink { parent, name }),
            "rmdir" => self.place(words[1]).map(|(parent, name)| Op::Rmdir { parent, name }),
            "rename" => rename(RenameMode::Replace),
            "rename-noreplace" => rename(RenameMode::NoReplace),
            "exchange" => rename(RenameMode::Exchange),
            "whiteout" => rename(RenameMode::Whiteout),
            "chmod" => set(SetAttr { mode: Some(octal(2)), ..none }),
            "chown" => set(SetAttr { uid: Some(octal(2)), gid: Some(octal(3)), clear_suid: true, ..none }),
            "truncate" => set(SetAttr { size: Some(number(2)), ..none }),
            "touch" => {
                set(SetAttr { atime: Some(SetTime::At(Time { secs: 1, nanos: 2 })), mtime: Some(SetTime::Now), ..none })
            }
            "setxattr" => xattr(XattrMode::Set),
            "setxattr-create" => xattr(XattrMode::Create),
            "setxattr-replace" => xattr(XattrMode::Replace),
            "removexattr" => Ok(Op::RemoveXattr { ino: self.ino(words[1])?, name: words[2].into() }),
            other => panic!("{other}?"),
        }
    }

    fn run(&mut self, words: &[&str], expected: &str) -> Result<String, Refusal> {
        match words[0] {
            "keep" => {
                let ino = self.ino(words[2])?;
                self.kept.insert(words[1].to_owned(), ino);
            }
            "unnamed" | "unnamed-for-good" => {
                let parent = self.ino(words[2])?;
                let mode = 0o644;
                let new = NewInode { kind: Kind::File, mode, uid: 10, gid: 20, rdev: 0, target: Vec::new() };
                let op = Op::MakeUnnamed { parent, new, linkable: words[0] == "unnamed" };
                if let Mutated::Inode { attr, .. } = self.world.mutate(op)? {
                    self.kept.insert(words[1].to_owned(), attr.ino);
                }
            }
            "stat" => {
                let attr = self.ino(words[1]).and_then(|ino| self.world.ask(|view| query::attr(view, ino)))?;
                return Ok(self.describe(&attr, expected));
            }
            "readlink" => {
                let ino = self.ino(words[1])?;
                return Ok(String::from_utf8(self.world.ask(|view| query::read_link(view, ino))?).unwrap());
            }
            "ls" => return self.list(words[1]),
            "getxattr" => {
                let ino = self.ino(words[1])?;
                return Ok(
                    String::from_utf8(self.world.ask(|view| query::xattr(view, ino, words[2].as_bytes()))?).unwrap()
                );
            }
            "parent" => {
                let ino = self.ino(words[1])?;
                let (parent, name) = self.world.ask(|view| query::parent(view, ino))?;
                return Ok(format!("{parent} {}", String::from_utf8(name).unwrap()));
            }
            _ => {
                let op = self.op(words)?;
                if let Mutated::Inode { created: false, .. } = self.world.mutate(op)?
                    && words[0] == "open"
                {
                    return Ok("there".into());
                }
            }
        }
        Ok("ok".into())
    }

    fn list(&self, path: &str) -> Result<String, Refusal> {
        let ino = self.ino(path)?;
        let page = self.world.ask(|view| query::read_directory(view, ino, 0, 100, false, None))?;
        let names: Vec<_> = page
            .into_iter()
            .flat_map(|page| page.entries)
            .map(|entry| String::from_utf8(entry.name).unwrap())
            .collect();
        Ok(if names.is_empty() { "nothing".into() } else { names.join(" ") })
    }

    /// The fields that `expected` asks for. Times are `now` (of the last operation) or `old`.
    fn describe(&self, attr: &Attr, expected: &str) -> String {
        let when = |time: Time| if time.secs == self.world.now { "now" } else { "old" };
        let field = |name: &str| match name {
            "nlink" => attr.nlink.to_string(),
            "size" => attr.size.to_string(),
            "mode" => format!("{:o}", attr.mode),
            "gid" => attr.gid.to_string(),
            "ino" => attr.ino.to_string(),
            "mtime" => when(attr.mtime).into(),
            "ctime" => when(attr.ctime).into(),
            "atime" => when(attr.atime).into(),
            other => panic!("{other}?"),
        };
        let names: Vec<&str> = expected.split_whitespace().step_by(2).collect();
        if names.iter().any(|name| name.starts_with(char::is_uppercase)) {
            return "it is there".into();
        }
        names.iter().map(|name| format!("{name} {}", field(name))).collect::<Vec<_>>().join(" ")
    }
}

#[test]
fn a_name_is_taken_until_it_is_unlinked() {
    check(
        "create /a
         create /a => Exists
         open /a => there
         stat /a => ino 2
         unlink /a
         stat /a => NotFound
         unlink /a => NotFound
         create /a
         stat /a => ino 3",
    );
}

#[test]
fn directories_count_their_subdirectories() {
    check(
        "stat / => nlink 2
         mkdir /d
         stat / => nlink 3 mtime now ctime now size 1
         stat /d => nlink 2 ctime now
         mkdir /d/e
         create /d/f
         stat /d => nlink 3 size 2
         rmdir /d => NotEmpty
         rmdir /d/f => NotDirectory
         unlink /d/e => IsDirectory
         rmdir /d/e
         stat /d => nlink 2 mtime now
         unlink /d/f
         rmdir /d
         stat / => nlink 2 size 0",
    );
}

#[test]
fn links_share_an_inode_until_the_last_name_goes() {
    check(
        "create /a
         mkdir /d
         link /a /d/b
         stat /a => nlink 2 ctime now mtime old
         stat /d => mtime now ctime now nlink 2
         link /d /x => NotPermitted
         link /a /d/b => Exists
         keep a /a
         unlink /a
         stat /d/b => nlink 1 ctime now
         unlink /d/b
         stat @a => nlink 0 ctime now
         link @a /again => NotFound
         truncate @a 7
         stat @a => size 7",
    );
}

#[test]
fn a_file_without_a_name_can_be_given_one_once() {
    check(
        "mkdir /d
         chown /d 7 70
         chmod /d 2777
         unnamed a /d
         ls /d => nothing
         stat /d => mtime old size 0
         stat @a => nlink 0 mode 2000644 gid 56
         truncate @a 7
         link @a /d/a
         stat /d/a => nlink 1 size 7 mode 644
         link /d/a /b
         unlink /d/a
         unlink /b
         link @a /again => NotFound
         unnamed-for-good x /
         link @x /x => NotFound
         unnamed y /missing => NotFound
         unnamed y /d/missing => NotFound",
    );
}

#[test]
fn nothing_happens_in_a_removed_directory() {
    check(
        "mkdir /d
         keep d /d
         rmdir /d
         stat @d => nlink 0
         create @d/f => NotFound
         mkdir @d/e => NotFound
         unlink @d/f => NotFound
         rmdir @d/f => NotFound
         stat @d/f => NotFound
         ls @d => nothing
         create /a
         link /a @d/b => NotFound
         rename /a @d/b => NotFound
         rename @d/b /a => NotFound
         chmod @d 700
         parent @d => NotFound",
    );
}

#[test]
fn rename_follows_posix() {
    check(
        "create /a
         rename /a /b
         stat /a => NotFound
         stat /b => nlink 1 ctime now mtime old
         stat / => mtime now ctime now size 1
         rename /a /b => NotFound
         create /c
         keep c /c
         rename /b /c
         stat @c => nlink 0 ctime now
         stat / => size 1
         rename-noreplace /c /c => Exists
         mkdir /d
         rename /c /d => IsDirectory
         rename /d /c => NotDirectory
         mkdir /d/e
         rename /d /d/e/f => Invalid
         rename /d /d/e => Invalid
         rename /d/e /d => NotEmpty
         mkdir /g
         rename /d /g
         stat / => nlink 3 size 2
         stat /g => nlink 3
         stat /g/e => nlink 2
         mkdir /h
         rename /g/e /h/e
         stat /g => nlink 2 size 0
         stat /h => nlink 3 size 1
         parent /h/e => 7 e
         create /c => Exists
         rename-noreplace /c /n
         stat /n => nlink 1",
    );
}

#[test]
fn renaming_one_name_of_an_inode_over_another_does_nothing() {
    check(
        "create /a
         link /a /b
         rename /a /b
         stat /a => nlink 2
         stat /b => nlink 2
         rename /a /a
         rename-noreplace /a /b => Exists
         stat / => size 2",
    );
}

#[test]
fn two_names_change_places() {
    check(
        "create /f
         mkdir /d
         mkdir /d/e
         create /d/e/x
         exchange /f /nothing => NotFound
         exchange /d /d/e => Invalid
         exchange /d/e /d => Invalid
         exchange /f /d/e
         stat /f => nlink 2 size 1 ctime now
         stat /d/e => nlink 1 ctime now
         stat /d => nlink 2 mtime now
         stat / => nlink 4
         parent /f => 1 f
         stat /f/x => size 0
         exchange /f /d
         stat /d/x => size 0
         stat /f/e => size 0",
    );
}

#[test]
fn names_are_bytes_within_limits() {
    check(
        "create /. => Invalid
         create /.. => Invalid
         create / => Invalid
         mkdir /LONG
         stat / => size 1
         rmdir /LONG
         create /LONGx => NameTooLong
         rename /a /LONGx => NameTooLong
         unlink /LONGx => NameTooLong
         create /a
         create /a/b => NotDirectory
         stat /a/b => NotDirectory
         ls /a => NotDirectory",
    );
}

#[test]
fn a_setgid_directory_gives_its_group_away() {
    check(
        "mkdir /d 755
         chmod /d 2755
         chown /d 1 77
         stat /d => gid 63 mode 2755
         create /d/f
         stat /d/f => gid 63 mode 644
         mkdir /d/e 700
         stat /d/e => gid 63 mode 2700
         create /f
         stat /f => gid 20",
    );
}

#[test]
fn a_new_owner_takes_the_set_bits_away() {
    check(
        "create /f 6755
         stat /f => mode 6755
         chown /f 5 5
         stat /f => mode 755 ctime now
         chmod /f 6644
         chown /f 5 5
         stat /f => mode 2644",
    );
}

#[test]
fn setattr_fits_the_kind_and_its_limits() {
    check(
        "create /f
         truncate /f 5
         stat /f => size 5 mtime now ctime now
         truncate /f 4503599626321920
         truncate /f 4503599626321921 => FileTooLarge
         mkdir /d
         truncate /d 0 => IsDirectory
         mkfifo /p
         truncate /p 0 => Invalid
         touch /f
         stat /f => mtime now ctime now atime old
         symlink /s target
         readlink /s => target
         stat /s => size 6
         readlink /f => Invalid",
    );
}

#[test]
fn attributes_are_set_made_replaced_and_removed() {
    check(
        "create /f
         setxattr-replace /f user.a 1 => NoAttribute
         setxattr-create /f user.a 1
         stat /f => ctime now mtime old
         setxattr-create /f user.a 2 => Exists
         setxattr /f user.a 3
         setxattr-replace /f user.a 4
         getxattr /f user.a => 4
         getxattr /f user.b => NoAttribute
         removexattr /f user.a
         removexattr /f user.a => NoAttribute",
    );
}

#[test]
fn a_renamed_entry_is_listed_where_it_arrived() {
    check(
        "create /a
         create /b
         create /c
         rename /a /z
         ls / => b c z
         exchange /b /z
         ls / => b c z",
    );
}
