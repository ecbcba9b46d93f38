// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/harness"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

// What is not left to CRIU so that the stop is short comes back all the same: the content of
// /dev, and a file that is open while one of its names is gone, for which CRIU makes a name of its
// own while storage is being taken.
func TestWhatIsTakenBesideTheDumpComesBack(t *testing.T) {
	w := setUp(t)
	const script = `echo note > /dev/note && ln -s /dev/note /dev/link && chmod 600 /dev/note &&
		echo first > /a && ln /a /b && exec 3</a && rm /a && echo up > /up &&
		while [ ! -e /go ]; do sleep 0.05; done; cat <&3 > /out.new; mv /out.new /out; sleep 1000`
	id, pid := w.run(harness.Container{Image: harness.BusyboxImage, Args: []string{"/bin/sh", "-c", script}})
	appears(t, pid, "up", "up\n")
	ref := w.image("beside")
	w.cohort("checkpoint", "--member", id, ref)
	appears(t, pid, "up", "up\n")
	for _, where := range []string{"", "tmp"} {
		leftOver(t, pid, where)
	}
	w.remove(id)

	w.in.RemoveAfter(t, id)
	r := decode[shop.Restored](w, "restore", ref)
	pid = r.Members[0].Pid
	root := fmt.Sprintf("/proc/%d/root/", pid)
	if got := w.inside(pid, "dev/note"); got != "note\n" {
		t.Errorf("/dev/note is %q", got)
	}
	if to, err := os.Readlink(root + "dev/link"); err != nil || to != "/dev/note" {
		t.Errorf("/dev/link leads to %q (%v)", to, err)
	}
	if fi, err := os.Stat(root + "dev/note"); err != nil || fi.Mode() != 0o600 {
		t.Errorf("/dev/note: %v, %v", fi, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(root+"dev/null", &st); err != nil || st.Mode != unix.S_IFCHR|0o666 || st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("/dev/null: mode %o, device %x (%v)", st.Mode, st.Rdev, err)
	}
	for _, where := range []string{"", "tmp"} {
		leftOver(t, pid, where)
	}
	w.must(os.WriteFile(root+"go", nil, 0o600))
	appears(t, pid, "out", "first\n")
}

// appears waits for a file of the container.
func appears(t *testing.T, pid int, name, content string) {
	t.Helper()
	harness.Eventually(t, recovery, func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/%s", pid, name))
		if err == nil && string(b) != content {
			err = fmt.Errorf("/%s holds %q, not %q", name, b, content)
		}
		return err
	})
}

// leftOver finds what CRIU makes in a container while it dumps it.
func leftOver(t *testing.T, pid int, dir string) {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/%s", pid, dir))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "link_remap") || strings.HasPrefix(e.Name(), "cr-tmpfs") {
			t.Errorf("/%s/%s was left", dir, e.Name())
		}
	}
}
