//! Codes, last errors, and the guard that every entry goes through.

use crate::abi::*;
use runtime::error::{Error, Remedy};
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

struct Last {
    message: CString,
    culprit: i64,
}

thread_local! {
    static LAST: RefCell<Option<Last>> = const { RefCell::new(None) };
}

/// The error of the last call on this thread that failed, in words, as UTF-8; an empty string when none has.
/// The pointer is valid until the next failing call on this thread or its end. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn carole_last_error() -> *const c_char {
    let message =
        LAST.try_with(|last| last.borrow().as_ref().map_or(c"".as_ptr(), |last| last.message.as_ptr()));
    message.unwrap_or(c"".as_ptr())
}

/// The rank at fault in the error of carole_last_error(), or -1 where there is none or it is not known.
#[unsafe(no_mangle)]
pub extern "C" fn carole_last_culprit() -> i64 {
    LAST.try_with(|last| last.borrow().as_ref().map_or(-1, |last| last.culprit)).unwrap_or(-1)
}

/// Runs the body of an entry: an error becomes its code and this thread's last error, and so does a panic.
pub fn enter(body: impl FnOnce() -> Result<(), Error>) -> i32 {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => CAROLE_OK,
        Ok(Err(error)) => {
            remember(&error.to_string(), culprit(&error));
            code(error.remedy())
        }
        Err(panic) => {
            remember(&format!("Carole has a defect, please report it: {}", words(&*panic)), -1);
            CAROLE_ERROR_INTERNAL
        }
    }
}

fn code(remedy: Remedy) -> i32 {
    match remedy {
        Remedy::FixProgram => CAROLE_ERROR_USAGE,
        Remedy::FixTensor => CAROLE_ERROR_MISMATCH,
        Remedy::ReformGroup => CAROLE_ERROR_BROKEN,
        Remedy::Stop => CAROLE_ERROR_SHUTDOWN,
        Remedy::WaitAgain => CAROLE_ERROR_TIMEOUT,
    }
}

fn culprit(error: &Error) -> i64 {
    match error {
        Error::Broken(broken) => broken.culprit.map_or(-1, |rank| i64::from(rank.0)),
        Error::Shutdown(Some(rank)) => i64::from(rank.0),
        _ => -1,
    }
}

fn words(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without words")
}

fn remember(message: &str, culprit: i64) {
    // A message may quote a name that a peer chose, and so hold a zero byte, which would end it for C.
    let message = CString::new(message.replace('\0', "\\0")).expect("zero bytes were replaced");
    // A thread that is ending has no last error any more; the code still tells.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Some(Last { message, culprit }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::error::{Broken, Cause};
    use runtime::types::{Epoch, Rank};
    use std::ffi::CStr;
    use std::sync::Arc;

    fn last() -> String {
        // SAFETY: the pointer is valid until the next failing call on this thread.
        unsafe { CStr::from_ptr(carole_last_error()) }.to_str().expect("UTF-8").to_owned()
    }

    #[test]
    fn a_panic_becomes_a_code_and_its_words() {
        assert_eq!(enter(|| panic!("the moon is {}", "blue")), CAROLE_ERROR_INTERNAL);
        assert!(last().contains("the moon is blue"));
        assert_eq!(carole_last_culprit(), -1);
    }

    #[test]
    fn a_broken_group_names_its_culprit() {
        let broken = Broken { epoch: Epoch(1), culprit: Some(Rank(3)), cause: Cause::Exited };
        assert_eq!(enter(|| Err(Error::Broken(Arc::new(broken)))), CAROLE_ERROR_BROKEN);
        assert_eq!(carole_last_culprit(), 3);
        assert!(last().contains("rank 3"));
    }

    #[test]
    fn a_message_with_a_zero_byte_is_kept_whole() {
        assert_eq!(enter(|| Err(Error::usage("before\0after"))), CAROLE_ERROR_USAGE);
        assert_eq!(last(), "before\\0after");
    }
}
