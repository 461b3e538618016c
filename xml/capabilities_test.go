package xml

import (
	"encoding/xml"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const xenCapabilities = `<capabilities>

  <host>
    <migration_features>
      <live/>
    </migration_features>
  </host>

  <guest>
    <os_type>xen</os_type>
    <arch name='x86_64'>
      <wordsize>64</wordsize>
      <emulator>/usr/bin/qemu-system-xen</emulator>
      <machine>xenpv</machine>
      <domain type='xen'/>
    </arch>
  </guest>

  <guest>
    <os_type>xenpvh</os_type>
    <arch name='x86_64'>
      <machine>xenpvh</machine>
      <domain type='xen'/>
    </arch>
  </guest>

</capabilities>
`

func TestAnnounce(t *testing.T) {
	const want = `
  </guest>

  <kemari xmlns='urn:kemari:capabilities:1.0' version='1'>
    <migration flag='1073741824'>
      <uri_transport>kemari+ssh</uri_transport>
    </migration>
    <checkpoint>
      <trigger>output</trigger>
      <trigger>interval</trigger>
    </checkpoint>
    <guest type='xen' arch='x86_64' machine='xenpv' supported='no'>
      <reason remedy='use a PVH guest, &lt;type arch=&apos;x86_64&apos; machine=&apos;xenpvh&apos;&gt;xenpvh&lt;/type&gt;'>a PV guest cannot be checkpointed, since Xen without shadow paging does not log which of its pages change</reason>
    </guest>
    <guest type='xenpvh' arch='x86_64' machine='xenpvh' supported='yes'/>
  </kemari>

</capabilities>
`
	got := Announce(xenCapabilities)
	head := xenCapabilities[:len(xenCapabilities)-len("\n  </guest>\n\n</capabilities>\n")]
	if d := cmp.Diff(head+want[:len("\n  </guest>")]+want[len("\n  </guest>\n"):], got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	// What a client reads of libvirt's is the same as before.
	var before, after struct {
		Host struct {
			Inner string `xml:",innerxml"`
		} `xml:"host"`
		Guest []struct {
			Inner string `xml:",innerxml"`
		} `xml:"guest"`
	}
	if err := xml.Unmarshal([]byte(xenCapabilities), &before); err != nil {
		t.Fatal(err)
	}
	if err := xml.Unmarshal([]byte(got), &after); err != nil || !cmp.Equal(before, after) {
		t.Errorf("%v %s", err, cmp.Diff(before, after))
	}
}

func TestAnnounceDomain(t *testing.T) {
	for machine, want := range map[string]string{
		"xenpvh": "\n  <kemari xmlns='urn:kemari:capabilities:1.0' supported='yes'/>\n",
		"xenfv":  "\n  <kemari xmlns='urn:kemari:capabilities:1.0' supported='yes'/>\n",
		"xenpv": "\n  <kemari xmlns='urn:kemari:capabilities:1.0' supported='no'>\n" +
			"    <reason remedy='use a PVH guest, &lt;type arch=&apos;x86_64&apos; machine=&apos;xenpvh&apos;&gt;xenpvh&lt;/type&gt;'>a PV guest cannot be checkpointed, since Xen without shadow paging does not log which of its pages change</reason>\n  </kemari>\n",
	} {
		head := "<domainCapabilities>\n  <path>/q</path>\n  <domain>xen</domain>\n  <machine>" + machine + "</machine>\n  <arch>x86_64</arch>"
		if d := cmp.Diff(head+want+"</domainCapabilities>\n", AnnounceDomain(head+"\n</domainCapabilities>\n")); d != "" {
			t.Errorf("%s (-want +got)\n%s", machine, d)
		}
	}
}

func TestAnnounceLeaves(t *testing.T) {
	for _, in := range []string{"", "<capabilities>", "<domain/>", "<x:capabilities xmlns:x='y'/>", "<domainCapabilitie/>"} {
		if out := Announce(in); out != in {
			t.Errorf("%q became %q", in, out)
		}
		if out := AnnounceDomain(in); out != in {
			t.Errorf("%q became %q", in, out)
		}
	}
}

func FuzzAnnounce(f *testing.F) {
	f.Add(xenCapabilities)
	f.Add("<domainCapabilities><machine>'&lt;</machine></domainCapabilities>")
	f.Fuzz(func(t *testing.T, in string) {
		for _, out := range []string{Announce(in), AnnounceDomain(in)} {
			if out == in {
				continue
			}
			if err := wellFormed(out); err != nil {
				t.Fatalf("%v in\n%s", err, out)
			}
		}
	})
}
