"""From measurements to a package: selection, templates, dks-codegen."""
