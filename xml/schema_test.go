package xml

import (
	"os/exec"
	"strings"
	"testing"

	"kemari/migrate/migratetest"
)

// The schema accepts what Parse accepts. What relates two attributes to each
// other is beyond it (relation).
func TestSchema(t *testing.T) {
	migratetest.Need(t, "xmllint", func() error {
		_, err := exec.LookPath("xmllint")
		return err
	})
	for dir, valid := range map[string]bool{"good": true, "loose": true, "relation": true, "bad": false} {
		args := []string{"--noout", "--nonet", "--relaxng", "kemari-metadata.rng"}
		for name := range files(t, dir) {
			args = append(args, name)
		}
		out, _ := exec.Command("xmllint", args...).CombinedOutput()
		for name := range files(t, dir) {
			want := name + " validates"
			if !valid {
				want = name + " fails to validate"
			}
			if !strings.Contains(string(out), want) {
				t.Errorf("want %q in\n%s", want, out)
			}
		}
	}
}
