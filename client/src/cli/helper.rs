//! `mount.holdfast SPEC MOUNTPOINT [-sfnv] [-o OPTIONS]`: what mount(8) and /etc/fstab call.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use super::{
    announce,
    error::{CliError, CliResult},
    mount::{MountArgs, prepare},
    print,
};
use crate::mount::options::MountOptions;

const NAME: &str = "mount.holdfast";
const USAGE: &str =
    "usage: mount.holdfast CLUSTER_OR_CONFIG MOUNTPOINT [-sfnv] [-o OPTIONS]; see `holdfast mount --help`";

/// What mount(8) asked for.
#[derive(Debug, Default, PartialEq, Eq)]
struct HelperArgs {
    spec: OsString,
    mountpoint: OsString,
    options: Vec<String>,
    /// `-f`: check, do not mount.
    fake: bool,
    /// `-s`: unknown options are no error.
    sloppy: bool,
    verbose: bool,
}

/// Whether a program called `name` is the helper.
pub(super) fn is_helper(name: &Path) -> bool {
    name.file_name() == Some(OsStr::new(NAME))
}

/// `arguments` without the program's name.
pub(super) fn run(arguments: &[OsString]) -> CliResult {
    let helper = parse(arguments)?;
    let (args, ignored) = for_mount(&helper)?;
    if helper.verbose && !ignored.is_empty() {
        print(&format!("{NAME}: ignored: {}\n", ignored.join(",")))?;
    }
    let log = args.log_file.clone();
    let command = command_line(&args);
    let (job, _) = prepare(args, helper.sloppy)?;
    if helper.verbose {
        print(&format!("{NAME}: {} on {}\n", job.plan.source, job.plan.mountpoint.display()))?;
    }
    if helper.fake {
        return Ok(());
    }
    announce::launch(&command, log.as_deref()).map(drop)
}

/// mount(8) puts the two names first, but getopt would take them anywhere.
fn parse(arguments: &[OsString]) -> CliResult<HelperArgs> {
    let mut parsed = HelperArgs::default();
    let mut names = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_bytes() {
            [b'-', flags @ ..] if !flags.is_empty() => parse_flags(&mut parsed, flags, &mut rest)?,
            _ => names.push(argument.clone()),
        }
    }
    let names: [OsString; 2] = names.try_into().map_err(|_| CliError::new(USAGE))?;
    [parsed.spec, parsed.mountpoint] = names;
    Ok(parsed)
}

fn parse_flags<'a>(parsed: &mut HelperArgs, flags: &[u8], rest: &mut impl Iterator<Item = &'a OsString>) -> CliResult {
    for (place, flag) in flags.iter().enumerate() {
        match flag {
            b'f' => parsed.fake = true,
            b's' => parsed.sloppy = true,
            b'v' => parsed.verbose = true,
            // There is no mtab to leave alone.
            b'n' => {}
            b'o' | b't' | b'N' => {
                let attached = flags.get(place + 1..).unwrap_or_default();
                let value = match attached {
                    [] => rest.next().ok_or_else(|| CliError::new(USAGE))?.clone(),
                    attached => OsStr::from_bytes(attached).to_owned(),
                };
                return value_of(parsed, *flag, value);
            }
            _ => return Err(CliError::new(USAGE)),
        }
    }
    Ok(())
}

fn value_of(parsed: &mut HelperArgs, flag: u8, value: OsString) -> CliResult {
    match flag {
        b'o' => {
            let list = value.into_string().map_err(|_| CliError::new("the mount options are not UTF-8"))?;
            parsed.options.push(list);
            Ok(())
        }
        // The type with its subtype: it led here.
        b't' => Ok(()),
        _ => Err(CliError::new("mounting in another namespace (-N) is not supported: enter it with nsenter(1)")),
    }
}

/// The mount command for `helper`, and the options that the sloppy ignore.
fn for_mount(helper: &HelperArgs) -> CliResult<(MountArgs, Vec<String>)> {
    let mut options = MountOptions::new(false);
    helper.options.iter().try_for_each(|list| options.add(list, helper.sloppy))?;
    let keep = |word: &&str| !options.ignored.iter().any(|ignored| ignored == word.trim());
    let kept = helper.options.iter().map(|list| list.split(',').filter(keep).collect::<Vec<_>>().join(","));
    let args = MountArgs {
        cluster: helper.spec.clone().into(),
        mountpoint: helper.mountpoint.clone().into(),
        options: kept.filter(|list| !list.is_empty()).collect(),
        foreground: false,
        log_file: options.log_file.clone(),
        client: holdfast_common::config::ClientOptions::default(),
        announce: false,
    };
    Ok((args, options.ignored.clone()))
}

fn command_line(args: &MountArgs) -> Vec<OsString> {
    let mut line: Vec<OsString> = vec!["mount".into()];
    for list in &args.options {
        line.extend(["-o".into(), list.into()]);
    }
    // A name may begin with a dash; nothing after it is an option but the flag that `launch` adds.
    line.extend([dashed(&args.cluster), dashed(&args.mountpoint)]);
    line
}

fn dashed(path: &Path) -> OsString {
    match path.as_os_str().as_bytes().first() {
        Some(b'-') => Path::new(".").join(path).into_os_string(),
        _ => path.as_os_str().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> CliResult<HelperArgs> {
        parse(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_helper_is_known_by_its_name() {
        assert!(is_helper(Path::new("/sbin/mount.holdfast")));
        assert!(is_helper(Path::new("mount.holdfast")));
        assert!(!is_helper(Path::new("/usr/bin/holdfast")));
        assert!(!is_helper(Path::new("/mount.holdfast/holdfast")));
    }

    #[test]
    fn mounts_way_of_calling_is_understood() {
        let expected = |options: &[&str]| HelperArgs {
            spec: "/etc/c.toml".into(),
            mountpoint: "/mnt".into(),
            options: options.iter().map(ToString::to_string).collect(),
            ..HelperArgs::default()
        };
        assert_eq!(parsed("/etc/c.toml /mnt").unwrap(), expected(&[]));
        assert_eq!(parsed("/etc/c.toml /mnt -o rw,noatime").unwrap(), expected(&["rw,noatime"]));
        assert_eq!(parsed("-orw /etc/c.toml -n /mnt -t fuse.holdfast").unwrap(), expected(&["rw"]));
        let all = HelperArgs { fake: true, sloppy: true, verbose: true, ..expected(&["ro", "suid"]) };
        assert_eq!(parsed("/etc/c.toml /mnt -sfnv -o ro -vo suid").unwrap(), all);
    }

    #[test]
    fn what_mount_never_says_is_refused() {
        for line in ["", "/a", "/a /b /c", "/a /b -o", "/a /b -x", "/a /b -N 5"] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }

    #[test]
    fn options_go_on_to_the_mount_command() {
        let helper = parsed("/d /m -s -o rw,frobnicate,log_file=/l,_netdev -o frobnicate").unwrap();
        let (args, ignored) = for_mount(&helper).unwrap();
        assert_eq!(ignored, ["frobnicate", "frobnicate"]);
        assert_eq!(args.log_file.as_deref(), Some(Path::new("/l")));
        assert_eq!(command_line(&args), ["mount", "-o", "rw,log_file=/l,_netdev", "/d", "/m"]);
        let strict = parsed("/d /m -o frobnicate").unwrap();
        assert!(for_mount(&strict).unwrap_err().to_string().contains("frobnicate"));
    }

    #[test]
    fn a_name_with_a_dash_is_no_option() {
        assert_eq!(dashed(Path::new("-x")), "./-x");
        assert_eq!(dashed(Path::new("/a-x")), "/a-x");
    }
}
