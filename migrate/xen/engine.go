package xen

import "kemari/migrate"

// What the engine and a Guest speak of.
type (
	Pages   = migrate.Pages
	Capture = migrate.Capture
)

var _ migrate.Guest = (*Domain)(nil)
