//! Panics of other people's code, as values.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    /// How many calls of [`caught`] this thread is in.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Runs code of a library that panics on some damaged input, and gives the panic's message as an error.
///
/// The panic is not reported on standard error: whoever gets the message decides what to say. Only panics on the calling
/// thread are caught. Nothing that `run` leaves half-changed may be used afterwards.
pub fn caught<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    static SILENCED: Once = Once::new();
    SILENCED.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if DEPTH.get() == 0 {
                report(panic);
            }
        }));
    });
    DEPTH.set(DEPTH.get() + 1);
    let outcome = catch_unwind(AssertUnwindSafe(run));
    DEPTH.set(DEPTH.get() - 1);
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        text.unwrap_or("no reason given").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::caught;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(caught(|| 3), Ok(3));
        let index = 7;
        assert_eq!(caught(|| panic!("no entry {index}")), Err::<(), _>("no entry 7".to_owned()));
        assert_eq!(caught(|| caught(|| panic!("inner"))), Ok(Err::<(), _>("inner".to_owned())));
    }
}
