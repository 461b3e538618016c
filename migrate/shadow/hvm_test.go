package shadow

import (
	"errors"
	"net"
	"testing"

	"kemari/migrate"
	"kemari/migrate/xen"
)

// A state is that of the guest the copy is of: with its device model's, or without.
func TestCheckDeviceModel(t *testing.T) {
	pvh := xen.AppendTSCInfo(nil, xen.TSCInfo{Mode: 1})
	pvh = xen.AppendRecord(pvh, xen.RecordHVMContext, make([]byte, 16))
	pvh = xen.AppendHVMParams(pvh, []xen.HVMParam{{Index: 1, Value: 2}})
	hvm := xen.AppendRecord(pvh[:len(pvh):len(pvh)], xen.RecordEnd, nil)
	hvm = xen.AppendRecord(hvm, 3, []byte("\x02\x00\x00\x00\x00\x00\x00\x00QEVM"))
	for _, deviceModel := range []bool{false, true} {
		ours, theirs := net.Pipe()
		go libvirtd(theirs, 2, true)
		s := &Shadow{cfg: Config{DeviceModel: deviceModel}, gone: make(chan struct{})}
		if err := s.connectOver(t.Context(), ours); err != nil {
			t.Fatal(err)
		}
		good, bad := pvh, hvm
		if deviceModel {
			good, bad = hvm, pvh
		}
		if err := s.Check(good); err != nil {
			t.Errorf("device model %v: %v", deviceModel, err)
		}
		if err := s.Check(bad); !errors.Is(err, xen.ErrStream) || errors.Is(err, migrate.ErrShadowLost) {
			t.Errorf("device model %v, a state of the other kind: %v", deviceModel, err)
		}
		theirs.Close()
		ours.Close()
	}
}
