//! Checks that every type and trait has a documentation comment.

use syn::visit::{self, Visit};
use syn::{Attribute, Ident, ItemEnum, ItemMod, ItemStruct, ItemTrait, Meta};

/// The derives of the command line.
const CLAP: &[&str] = &["Args", "Parser", "Subcommand", "ValueEnum"];

/// Types and traits without a documentation comment, except for tests.
pub(crate) fn item_problems(text: &str) -> Vec<String> {
    let file = syn::parse_file(text).expect("a source file");
    let mut undocumented = Undocumented(Vec::new());
    undocumented.visit_file(&file);
    undocumented.0
}

struct Undocumented(Vec<String>);

impl Undocumented {
    fn check(&mut self, attributes: &[Attribute], name: &Ident) {
        // clap uses the documentation of these types as help texts.
        let is_exempt = attributes.iter().any(|attribute| match &attribute.meta {
            Meta::NameValue(value) => value.path.is_ident("doc"),
            Meta::List(list) => {
                let text = list.tokens.to_string();
                CLAP.iter().any(|derive| text.contains(derive))
            }
            Meta::Path(_) => false,
        });
        if !is_exempt {
            self.0.push(format!(" `{name}` has no documentation"));
        }
    }
}

impl<'ast> Visit<'ast> for Undocumented {
    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if !item.attrs.iter().any(|attribute| attribute.path().is_ident("cfg")) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_struct(&mut self, item: &'ast ItemStruct) {
        if !matches!(item.vis, syn::Visibility::Inherited) {
            self.check(&item.attrs, &item.ident);
        }
    }

    fn visit_item_enum(&mut self, item: &'ast ItemEnum) {
        if !matches!(item.vis, syn::Visibility::Inherited) {
            self.check(&item.attrs, &item.ident);
        }
    }

    fn visit_item_trait(&mut self, item: &'ast ItemTrait) {
        self.check(&item.attrs, &item.ident);
    }
}

#[test]
fn item_check_reports_undocumented_types_and_traits() {
    let text = "/// A.\npub struct A;\npub(crate) struct B;\nenum C {}\n\
                pub enum D {}\ntrait E {}\nfn f() {}\n#[derive(clap::Args)] pub struct F;\n#[cfg(test)] mod tests { pub struct T; }";
    let expected = ["B", "D", "E"].map(|name| format!(" `{name}` has no documentation"));
    assert_eq!(item_problems(text), expected);
}
