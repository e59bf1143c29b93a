//! How the kernel gives this process memory.
#![allow(unsafe_code, reason = "a system call that std does not offer")]

use std::io;

/// What prctl(2) takes.
const YES: libc::c_ulong = 1;
const NO: libc::c_ulong = 0;

/// Memory in pages of 4 KiB only, from now on. A page of 2 MiB is cleared whole when its first byte is touched; whoever waits for the
/// thread that touches it waits for that (PR_SET_THP_DISABLE in prctl(2)).
pub fn only_small_pages() -> io::Result<()> {
    // SAFETY: no memory is passed.
    match unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, YES, NO, NO, NO) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_large_page_is_asked_for() {
        only_small_pages().unwrap();
        // SAFETY: no memory is passed.
        assert_eq!(unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, NO, NO, NO, NO) }, 1);
    }
}
