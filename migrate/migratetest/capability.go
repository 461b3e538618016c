package migratetest

import (
	"os"
	"strings"
	"testing"
)

// Need skips the test where a capability of the machine is missing, and says
// which and why. Where the environment's KEMARI_REQUIRE lists the capability
// (names separated by commas or spaces) or is "all", the run has promised to have
// it, and the test fails instead: skips cannot rot.
func Need(t testing.TB, capability string, have func() error) {
	t.Helper()
	err := have()
	if err == nil {
		return
	}
	require := os.Getenv("KEMARI_REQUIRE")
	for _, r := range strings.FieldsFunc(require, func(r rune) bool { return r == ',' || r == ' ' }) {
		if r == "all" || r == capability {
			t.Fatalf("KEMARI_REQUIRE=%q, but %s is missing: %v", require, capability, err)
		}
	}
	t.Skipf("needs capability %s: %v", capability, err)
}
