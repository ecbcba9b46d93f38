// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/api/types"
)

func TestCheckpointIsFoundOnlyBesideTheTopmostLayerOfOurSnapshotter(t *testing.T) {
	root := t.TempDir()
	snap := func(n string) string { return filepath.Join(root, "snapshots", n, "fs") }
	for _, n := range []string{"1", "2", "3"} {
		if err := os.MkdirAll(snap(n), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mounts := func(lower string) []*types.Mount {
		return []*types.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + lower, "upperdir=" + snap("3"), "workdir=x"}}}
	}
	if err := os.Mkdir(filepath.Join(root, "snapshots", "2", "checkpoint"), 0o700); err != nil {
		t.Fatal(err)
	}
	if s := storageOf(mounts(snap("2") + ":" + snap("1"))); s.socket != "" || len(s.checkpoints()) > 0 {
		t.Fatalf("without cohortd's socket: %+v", s)
	}
	l, err := net.Listen("unix", filepath.Join(root, "host.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := storageOf(mounts(snap("2") + ":" + snap("1")))
	if want := filepath.Join(root, "snapshots", "2", "checkpoint"); !slices.Equal(s.checkpoints(), []string{want}) || s.upper != snap("3") {
		t.Fatalf("%+v, checkpoint %q; want %q", s, s.checkpoints(), want)
	}
	if s := storageOf(mounts(snap("1") + ":" + snap("2"))); len(s.checkpoints()) > 0 {
		t.Fatalf("a checkpoint below other layers was taken: %+v", s)
	}
	if err := os.Remove(filepath.Join(root, "snapshots", "2", "checkpoint")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/", filepath.Join(root, "snapshots", "2", "checkpoint")); err != nil {
		t.Fatal(err)
	}
	if s := storageOf(mounts(snap("2"))); len(s.checkpoints()) > 0 {
		t.Fatalf("a link was followed: %q", s.checkpoints())
	}
}
