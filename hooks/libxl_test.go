package hooks

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"kemari/xml"
)

func TestLibxl(t *testing.T) {
	const uuid = "00000000-0000-4000-8000-0000000000a1"
	const unit = "kemari-autostart@" + uuid + ".service"
	asking := xml.Default()
	asking.Autostart = true
	asking.Standby = &xml.Standby{URI: "kemari+ssh://xen2/system"}
	set := func(d string, e *xml.Element) string {
		d, err := xml.SetInDomain(d, e)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	plain := "<domain type='xen' id='1'><name>g1</name><uuid>" + uuid + "</uuid></domain>"
	asks := set(plain, asking)
	started := []string{"g1", "started", "begin", "-"}
	for _, tt := range []struct {
		name  string
		args  []string
		in    string
		fails error  // of systemctl
		unit  string // started
		log   string // a part of it
	}{
		{name: "asks", args: started, in: asks, unit: unit},
		{name: "start fails", args: started, in: asks, fails: errors.New("no bus"), unit: unit, log: "no bus"},
		{name: "has no element", args: started, in: plain},
		{name: "does not ask", args: started, in: set(plain, xml.Default())},
		{name: "bad element", args: started, in: strings.Replace(asks, "output", "moon", 1), log: "unknown value 'moon'"},
		{name: "bad UUID", args: started, in: strings.Replace(asks, uuid, "../../x", 1), log: "is not a UUID"},
		{name: "not XML", args: started, in: "asks", log: "not protected"},
		{name: "nothing", args: started, log: "not protected"},
		{name: "too long", args: started, in: asks + strings.Repeat(" ", maxDomain), log: "more than 1048576 bytes"},
		{name: "prepare", args: []string{"g1", "prepare", "begin", "-"}, in: asks},
		{name: "start", args: []string{"g1", "start", "begin", "-"}, in: asks},
		{name: "migrate", args: []string{"g1", "migrate", "begin", "-"}, in: asks},
		{name: "reconnect", args: []string{"g1", "reconnect", "begin", "-"}, in: asks},
		{name: "stopped", args: []string{"g1", "stopped", "end", "-"}, in: asks},
		{name: "release", args: []string{"g1", "release", "end", "-"}, in: asks},
		{name: "started, another part", args: []string{"g1", "started", "end", "-"}, in: asks},
		{name: "no arguments", in: asks},
		{name: "few arguments", args: started[:2], in: asks},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log bytes.Buffer
			var got string
			h := Libxl{
				Log:   slog.New(slog.NewTextHandler(&log, nil)),
				Start: func(_ context.Context, unit string) error { got = unit; return tt.fails },
			}
			in := strings.NewReader(tt.in)
			h.Run(t.Context(), tt.args, in)
			if got != tt.unit {
				t.Errorf("started %q, want %q", got, tt.unit)
			}
			if tt.log == "" && log.Len() > 0 || !strings.Contains(log.String(), tt.log) {
				t.Errorf("log %q, want %q", log.String(), tt.log)
			}
			if in.Len() > 0 && len(tt.in) <= maxDomain {
				t.Errorf("%d bytes were not read", in.Len())
			}
		})
	}
}
