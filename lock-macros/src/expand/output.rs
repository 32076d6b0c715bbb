//! The type that the asynchronous body returns.

use super::function::Shape;
use syn::spanned::Spanned;
use syn::visit_mut::{self, VisitMut};
use syn::{
    Error, GenericArgument, PathArguments, Result, ReturnType, Signature, Type, TypeInfer, TypeParamBound,
};

/// The declared type, if the signature shows it. An alias such as `BoxFuture` does not.
pub(super) fn of(signature: &Signature, shape: Shape) -> Result<Option<Type>> {
    let output = match &signature.output {
        ReturnType::Default => None,
        ReturnType::Type(_, output) if shape == Shape::Awaited => Some(&**output),
        ReturnType::Type(_, boxed) => match future_output(boxed) {
            Some(output) => Some(output),
            None => return Ok(None),
        },
    };
    match output {
        Some(output) if !is_unit(output) => Ok(Some(output.clone())),
        _ => {
            let message = "a locked function must return `Result<_, E>` where `E: From<lock_db::Error>`: this one \
                           returns nothing, so it can't say that there was no lock";
            Err(Error::new(signature.ident.span(), message))
        }
    }
}

fn is_unit(output: &Type) -> bool {
    match output {
        Type::Tuple(tuple) => tuple.elems.is_empty(),
        Type::Paren(inner) => is_unit(&inner.elem),
        Type::Group(inner) => is_unit(&inner.elem),
        _ => false,
    }
}

/// `T` in `Pin<Box<dyn Future<Output = T> + Send>>` and `impl Future<Output = T>`.
fn future_output(boxed: &Type) -> Option<&Type> {
    match boxed {
        Type::Path(path) => {
            arguments(&path.path.segments.last()?.arguments).find_map(|argument| match argument {
                GenericArgument::Type(inner) => future_output(inner),
                _ => None,
            })
        }
        Type::TraitObject(object) => object.bounds.iter().find_map(bound_output),
        Type::ImplTrait(future) => future.bounds.iter().find_map(bound_output),
        _ => None,
    }
}

/// `T` in `Future<Output = T>`.
fn bound_output(bound: &TypeParamBound) -> Option<&Type> {
    let TypeParamBound::Trait(bound) = bound else { return None };
    arguments(&bound.path.segments.last()?.arguments).find_map(|argument| match argument {
        GenericArgument::AssocType(assigned) if assigned.ident == "Output" => Some(&assigned.ty),
        _ => None,
    })
}

fn arguments(arguments: &PathArguments) -> impl Iterator<Item = &GenericArgument> {
    let given = match arguments {
        PathArguments::AngleBracketed(given) => Some(&given.args),
        _ => None,
    };
    given.into_iter().flatten()
}

/// The type with `_` for each `impl Trait`, which can't be named in a body.
pub(super) fn erase_impl_trait(output: &Type) -> Type {
    let mut output = output.clone();
    Eraser { found: false }.visit_type_mut(&mut output);
    output
}

pub(super) fn contains_impl_trait(output: &Type) -> bool {
    let mut eraser = Eraser { found: false };
    eraser.visit_type_mut(&mut output.clone());
    eraser.found
}

struct Eraser {
    found: bool,
}

impl VisitMut for Eraser {
    fn visit_type_mut(&mut self, part: &mut Type) {
        if let Type::ImplTrait(_) = part {
            self.found = true;
            *part =
                Type::Infer(TypeInfer { attrs: Vec::new(), underscore_token: syn::Token![_](part.span()) });
        } else {
            visit_mut::visit_type_mut(self, part);
        }
    }
}
