// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestSpecForARestoreReachesForNothingOnTheHost(t *testing.T) {
	saved := ckptSpec()
	saved.Linux.RootfsPropagation = "rshared"
	saved.Mounts = append(saved.Mounts, bindMount("/data", "/old/data", "rshared"))
	before, _ := json.Marshal(saved)
	s, err := RestoreSpec(saved, ckptMeta(), map[string]string{"/data/": "/srv/data"})
	must(t, err)
	if after, _ := json.Marshal(saved); string(after) != string(before) {
		t.Error("the input was changed")
	}
	b, _ := json.Marshal(s)
	for _, word := range []string{"/old", "evil", "shared", "eth0", "wasm", "hold"} {
		if strings.Contains(string(b), word) {
			t.Errorf("%q is left: %s", word, b)
		}
	}
	if n := len(s.Mounts); n != 9 || s.Mounts[8].Source != "/srv/data" || s.Annotations[AnnotationGroup] != "shop" || s.Process.Args[0] != "postgres" {
		t.Errorf("spec: %s", b)
	}
	// What it gives is what Reconcile takes.
	saved.Linux.RootfsPropagation = ""
	saved.Mounts[9].Options = []string{"rbind"}
	s, err = RestoreSpec(saved, ckptMeta(), map[string]string{"/data": "/srv/data"})
	must(t, err)
	r, err := Reconcile(s, saved, ckptMeta(), recOpts)
	must(t, err)
	if len(r.Warnings) != 0 || len(r.Files) != 1 {
		t.Errorf("warnings %q, files %v", r.Warnings, r.Files)
	}
}

func TestMountThatNobodyGaveIsNotTakenFromTheCheckpoint(t *testing.T) {
	for name, c := range map[string]struct {
		mount specs.Mount
		kind  string
		binds map[string]string
		word  string
	}{
		"left out":           {bindMount("/data", "/etc"), MountLeftOut, nil, "/data"},
		"called internal":    {bindMount("/data", "/etc"), MountInternal, nil, "/data"},
		"called tmpfs":       {specs.Mount{Destination: "/data", Type: "tmpfs", Source: "/etc", Options: []string{"bind"}}, MountTmpfs, nil, "/data"},
		"disk":               {specs.Mount{Destination: "/data", Type: "ext4", Source: "/dev/vda1"}, MountInternal, nil, "ext4"},
		"source for nothing": {bindMount("/data", "/etc"), MountLeftOut, map[string]string{"/data": "/x", "/other": "/x"}, "/other"},
		"source for a tmpfs": {specs.Mount{Destination: "/data", Type: "tmpfs"}, MountTmpfs, map[string]string{"/data": "/x"}, "/data"},
		"relative source":    {bindMount("/data", "/etc"), MountLeftOut, map[string]string{"/data": "x"}, "absolute"},
	} {
		t.Run(name, func(t *testing.T) {
			saved, meta := ckptSpec(), ckptMeta()
			saved.Mounts = append(saved.Mounts, c.mount)
			meta.Mounts = append(meta.Mounts, Mount{Destination: "/data", Kind: c.kind})
			_, err := RestoreSpec(saved, meta, c.binds)
			wantErr(t, err, nil, c.word, "restoring db")
		})
	}
	_, err := RestoreSpec(&specs.Spec{}, ckptMeta(), nil)
	wantErr(t, err, errdefs.ErrInvalidArgument)
}
