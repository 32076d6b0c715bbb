//! Several locks on one function: taken in reading order, from the top down.
//!
//! Attributes are expanded from the top, each with the item that the one above it has produced. So
//! by itself a lower attribute would wrap the code of the upper one, and take its lock first. The
//! upper one can't prevent that. It sees the lower one only by a name, which may have been changed
//! (`use lock_db::distributed_lock as locked`), or inside of a `cfg_attr` or a macro. But the lower
//! one can find what the upper one has generated, whatever its name was: a call of
//! `__private::run…`, with the body as its argument. There it puts its own lock, around the body
//! alone.
//!
//! This also works when another attribute (`#[tracing::instrument]`, `#[tokio::test]`) has wrapped
//! the function in between.

use std::mem;

use syn::visit_mut::{self, VisitMut};
use syn::{Block, Expr, ExprCall, Ident, Item, Local, Pat, Stmt};

use super::Code;
use super::function::{AsyncBody, end_of, receiver};

/// Puts the lock inside of the innermost lock that the function already has. `false`: it has none.
pub(super) fn lock_inside(block: &mut Block, code: &Code) -> bool {
    let mut search = Search { code, receiver: None, found: false };
    search.visit_block_mut(block);
    search.found
}

struct Search<'a> {
    code: &'a Code,
    /// The name that `#[async_trait]` gives `self`, found during the search.
    receiver: Option<Ident>,
    found: bool,
}

impl VisitMut for Search<'_> {
    /// Functions within the function have their own locks.
    fn visit_item_mut(&mut self, _item: &mut Item) {}

    fn visit_local_mut(&mut self, local: &mut Local) {
        if let Some(receiver) = receiver(local) {
            self.receiver = Some(receiver.clone());
        }
        visit_mut::visit_local_mut(self, local);
    }

    fn visit_expr_call_mut(&mut self, call: &mut ExprCall) {
        let Some(body) = body_of(call) else { return visit_mut::visit_expr_call_mut(self, call) };
        let receiver = self.receiver.clone();
        self.visit_block_mut(body);
        if mem::replace(&mut self.found, true) {
            return;
        }
        let end = end_of(body);
        let mut statements = mem::take(&mut body.stmts);
        // The return edge of the upper lock. The lower lock has its own.
        let edge = statements.iter().position(is_return_edge).map(|edge| statements.remove(edge));
        let body_inside = AsyncBody { bindings: Vec::new(), receiver, statements, end };
        body.stmts = edge.into_iter().chain(self.code.locked(&body_inside)).collect();
    }
}

/// The body that a lock runs, with everything that was generated in it.
fn body_of(call: &mut ExprCall) -> Option<&mut Block> {
    let Expr::Path(function) = &*call.func else { return None };
    let mut segments = function.path.segments.iter().rev();
    let runs = segments.next().is_some_and(|segment| segment.ident.to_string().starts_with("run"))
        && segments.next().is_some_and(|segment| segment.ident == "__private");
    let Some(Expr::Async(body)) = call.args.iter_mut().nth(1).filter(|_| runs) else { return None };
    if !body.block.stmts.first().is_some_and(|statement| is_local(statement, "__bound")) {
        return Some(&mut body.block);
    }
    // After the binding of the guard, so that the name of the lower lock may use the guard.
    body.block.stmts.iter_mut().find(|statement| is_local(statement, "__output")).and_then(|statement| {
        let Stmt::Local(Local { init: Some(init), .. }) = statement else { return None };
        match &mut *init.expr {
            Expr::Block(block) => Some(&mut block.block),
            _ => None,
        }
    })
}

fn is_local(statement: &Stmt, name: &str) -> bool {
    let Stmt::Local(Local { pat, .. }) = statement else { return false };
    let pattern = match pat {
        Pat::Type(typed) => &*typed.pat,
        pattern => pattern,
    };
    matches!(pattern, Pat::Ident(pattern) if pattern.ident == name)
}

/// `if let Some(__output) = None::<…> { return __output; }`
fn is_return_edge(statement: &Stmt) -> bool {
    let Stmt::Expr(Expr::If(edge), _) = statement else { return false };
    let Expr::Let(condition) = &*edge.cond else { return false };
    let Pat::TupleStruct(pattern) = &*condition.pat else { return false };
    matches!(pattern.elems.first(), Some(Pat::Ident(pattern)) if pattern.ident == "__output")
}
