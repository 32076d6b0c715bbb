//! Synchronisation primitives that the tests in `interleavings` can replace. With `RUSTFLAGS='--cfg
//! lock_db_shuttle'` each operation on them is a step before which shuttle may switch threads
//! (docs/testing.md).

pub(crate) use self::chosen::*;

#[cfg(not(all(test, lock_db_shuttle)))]
mod chosen {
    pub(crate) use std::collections::HashMap;
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};
    pub(crate) use std::sync::{Mutex, MutexGuard};

    pub(crate) use tokio::task_local;
    pub(crate) use tokio::time::sleep_until;
}

#[cfg(all(test, lock_db_shuttle))]
mod chosen {
    use std::cell::RefCell;
    use std::hash::{BuildHasherDefault, DefaultHasher};
    use std::ops::{Deref, DerefMut};
    use std::sync::atomic::Ordering;
    use std::sync::{LockResult, PoisonError};

    pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};
    use shuttle::thread::LocalKey;
    use tokio::time::Instant;

    /// Iterates in the same order in every run, so that a schedule can be replayed.
    pub(crate) type HashMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

    /// shuttle may switch threads before each of its own steps. An unlock may be followed by a step
    /// of tokio, which shuttle does not know, so the guard adds one more step after the unlock.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    pub(crate) struct MutexGuard<'a, T> {
        /// Before `_then`, so that it is dropped first.
        guard: shuttle::sync::MutexGuard<'a, T>,
        _then: Step,
    }

    struct Step;

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
            let with_step = |guard| MutexGuard { guard, _then: Step };
            match self.0.lock() {
                Ok(guard) => Ok(with_step(guard)),
                Err(poisoned) => Err(PoisonError::new(with_step(poisoned.into_inner()))),
            }
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            &self.guard
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            &mut self.guard
        }
    }

    impl Drop for Step {
        fn drop(&mut self) {
            if !std::thread::panicking() {
                AtomicBool::new(false).load(Ordering::SeqCst);
            }
        }
    }

    /// Time stands still: a deadline in the future is never reached.
    pub(crate) async fn sleep_until(deadline: Instant) {
        if deadline > Instant::now() {
            std::future::pending::<()>().await;
        }
    }

    /// tokio's task-local is a thread-local of the operating system's thread, on which all of
    /// shuttle's threads run.
    pub(crate) struct TaskLocal<T: 'static>(pub(crate) &'static LocalKey<RefCell<Option<T>>>);

    macro_rules! task_local {
        (static $name:ident: $type:ty;) => {
            static $name: crate::sync::TaskLocal<$type> = {
                shuttle::thread_local! {
                    static VALUE: std::cell::RefCell<Option<$type>> = std::cell::RefCell::new(None);
                }
                crate::sync::TaskLocal(&VALUE)
            };
        };
    }
    pub(crate) use task_local;

    impl<T: 'static> TaskLocal<T> {
        pub(crate) fn try_with<R>(&'static self, read: impl FnOnce(&T) -> R) -> Result<R, NotInScope> {
            self.0.with(|value| value.borrow().as_ref().map(read)).ok_or(NotInScope)
        }

        pub(crate) fn sync_scope<R>(&'static self, value: T, part: impl FnOnce() -> R) -> R {
            let outer = self.0.with(|current| current.replace(Some(value)));
            let output = part();
            self.0.with(|current| current.replace(outer));
            output
        }

        pub(crate) fn scope<F: Future>(
            &'static self,
            value: T,
            future: F,
        ) -> impl Future<Output = F::Output> + use<T, F> {
            let mut future = Box::pin(future);
            let mut value = Some(value);
            std::future::poll_fn(move |context| {
                let outer = self.0.with(|current| current.replace(value.take()));
                let polled = future.as_mut().poll(context);
                value = self.0.with(|current| current.replace(outer));
                polled
            })
        }
    }

    #[derive(Debug)]
    pub(crate) struct NotInScope;
}
