// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netns"

	"github.com/cohort-project/cohort/integration/shop/harness"
)

// bare is an instance without any process.
func bare(t *testing.T) *Instance {
	t.Helper()
	RequireRoot(t)
	return &Instance{State: t.TempDir(), Root: t.TempDir(), tag: randomTag()}
}

// found expects exactly one leak, and that it is named.
func found(t *testing.T, in *Instance, want string) {
	t.Helper()
	err := in.Leaks()
	if err == nil || strings.Count(err.Error(), "\n") != 0 || !strings.Contains(err.Error(), want) {
		t.Errorf("want one leak named %q, got: %v", want, err)
	}
}

func put(t *testing.T, content string, path ...string) {
	t.Helper()
	file := filepath.Join(path...)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestNothingIsCleanIfNothingWasDone(t *testing.T) {
	in := bare(t)
	put(t, `{"state":"sealed"}`, in.Root, "captures", "0123", "capture.json")
	put(t, `{}`, in.State, "members", "default", "a.json")
	if err := in.Leaks(); err != nil {
		t.Error(err)
	}
}

func TestRecordsLeftBehindAreFound(t *testing.T) {
	in := bare(t)
	put(t, `{}`, in.State, "epochs", "default", "a.json")
	found(t, in, "epochs/default/a.json")
}

func TestUnsealedCapturesAreFound(t *testing.T) {
	in := bare(t)
	put(t, `{"state":"open"}`, in.Root, "captures", "0123", "capture.json")
	found(t, in, "captures/0123 (open)")
}

func TestFrozenCgroupsAreFound(t *testing.T) {
	in := bare(t)
	file, state, thawed := "freezer.state", "FROZEN", "THAWED"
	root := "/sys/fs/cgroup/freezer"
	if _, err := os.Stat(root); err != nil {
		root, file, state, thawed = "/sys/fs/cgroup", "cgroup.freeze", "1", "0"
	}
	parent := filepath.Join(root, in.Name("harness"))
	dir := filepath.Join(parent, "x")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		Require(t, false, "a freezer cgroup hierarchy that can be written to")
	}
	t.Cleanup(func() {
		_ = os.Remove(dir)
		if err := os.Remove(parent); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, file), []byte(state), 0); err != nil {
		t.Fatal(err)
	}
	found(t, in, dir)
	if err := os.WriteFile(filepath.Join(dir, file), []byte(thawed), 0); err != nil {
		t.Fatal(err)
	}
	if err := in.Leaks(); err != nil {
		t.Error(err)
	}
}

func TestTablesInNamedNamespacesAreFound(t *testing.T) {
	in := bare(t)
	n, err := harness.NewNet("harness")
	if err != nil {
		Require(t, false, "network namespaces: "+err.Error())
	}
	defer func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}()
	h, err := netns.GetFromPath(n.GroupPath())
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(h)))
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"cohort-0123-" + in.Name("db"), "cohort-of-others", in.Name("other")} {
		conn.AddTable(&nftables.Table{Name: table, Family: nftables.TableFamilyINet})
	}
	if err := conn.Flush(); err != nil {
		Require(t, false, "nftables: "+err.Error())
	}
	found(t, in, "cohort-0123-db")
}

func TestACriuLeftBehindIsFound(t *testing.T) {
	in := bare(t)
	// Called what it is by its first argument, which is how the set-up's wrapper runs it.
	cmd := exec.Command("/bin/sh", "-c", "read x; exit $x", "/somewhere/criu")
	cmd.Env = []string{"COHORT_STATE=" + in.State}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		_ = cmd.Wait()
	}()
	found(t, in, "/somewhere/criu")
	in.State = t.TempDir()
	if err := in.Leaks(); err != nil {
		t.Errorf("another instance's CRIU: %v", err)
	}
}

func TestNamesAreNotGivenTwice(t *testing.T) {
	a, b := &Instance{tag: randomTag()}, &Instance{tag: randomTag()}
	seen := map[string]bool{}
	for range 100 {
		for _, in := range []*Instance{a, b} {
			name := in.Name("x")
			if seen[name] {
				t.Fatalf("%s is given twice", name)
			}
			seen[name] = true
			if !in.mine(name) || a.mine(name) == b.mine(name) {
				t.Fatalf("%s belongs to both or none", name)
			}
		}
	}
}
