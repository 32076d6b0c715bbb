//! x
#![forbid(unsafe_code)]
mod args;
mod expand;
use proc_macro::TokenStream;

/// x
#[proc_macro_attribute]
pub fn distributed_lock(arguments: TokenStream, item: TokenStream) -> TokenStream {
    expand::expand(arguments.into(), &item.into()).into()
}
