//! Names that are expressions: text is used as it is, any other value by its `Display`.

use std::fmt::Display;
use std::ops::Deref;

/// The compiler takes the first `lock_name` whose bounds the type meets, starting here and
/// following `Deref`.
pub struct Text<'a, T: ?Sized>(Shown<'a, T>);
pub struct Shown<'a, T: ?Sized>(Neither<'a, T>);
pub struct Neither<'a, T: ?Sized>(&'a T);

#[must_use]
pub fn name<T: ?Sized>(value: &T) -> Text<'_, T> {
    Text(Shown(Neither(value)))
}

impl<T: AsRef<str> + ?Sized> Text<'_, T> {
    #[must_use]
    pub fn lock_name(&self) -> String {
        self.0.0.0.as_ref().to_owned()
    }
}

impl<'a, T: ?Sized> Deref for Text<'a, T> {
    type Target = Shown<'a, T>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T: Display + ?Sized> Shown<'_, T> {
    #[must_use]
    pub fn lock_name(&self) -> String {
        self.0.0.to_string()
    }
}

impl<'a, T: ?Sized> Deref for Shown<'a, T> {
    type Target = Neither<'a, T>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T: ?Sized> Neither<'_, T> {
    /// Never compiles. Its bound gives the error our own message.
    #[allow(clippy::unused_self)]
    pub fn lock_name(&self) -> String
    where
        T: NamesLock,
    {
        unreachable!("nothing implements the trait")
    }
}

#[diagnostic::on_unimplemented(
    message = "`{Self}` can't name a lock",
    label = "neither text (`AsRef<str>`) nor shown as text (`Display`)",
    note = "name a lock by what identifies the thing: `format!(\"order:{{}}\", order.id)`"
)]
pub trait NamesLock {}
