// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"fmt"
	"path"
	"regexp"
	"strings"
	"sync"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/containerd/errdefs"
)

// ReservedDir is the one directory of the checkpoint layer, at its root. The
// snapshotter takes it out of the file system when the layer is committed.
const ReservedDir = ".cohort"

// Names inside the checkpoint directory. Those that checkpointctl's library
// defines are its own, so its tools find them.
const (
	CheckpointFile  = "cohort.json"
	ConfigDumpFile  = metadata.ConfigDumpFile
	SpecDumpFile    = metadata.SpecDumpFile
	NetworkFile     = metadata.NetworkStatusFile
	DumpLogFile     = metadata.DumpLogFile
	StatsDumpFile   = "stats-dump"
	ImagesDir       = metadata.CheckpointDirectory // CRIU's images
	FilesDir        = "files"                      // bind-mounted files, captured
	TmpfsDir        = "tmpfs"                      // contents of tmpfs mounts, as tar archives
	imageSuffix     = ".img"
	parentImagesDir = "parent" // CRIU's name for the images an increment builds on
)

// Annotations of the group index, of its member manifests and of their
// descriptors in the index. All are copies for people and tools: a restore
// reads cohort.json and trusts no annotation.
const (
	AnnotationGroup       = "io.cohort.group"        // name of the group
	AnnotationMember      = "io.cohort.member"       // name of the member within it
	AnnotationEpoch       = "io.cohort.epoch"        // epoch id, 32 hex digits
	AnnotationEpochNumber = "io.cohort.epoch-number" // decimal, counts per group from 1
	// AnnotationParent and AnnotationParentNumber name the epoch that an increment
	// builds on; AnnotationChain says of how many epochs it consists, decimal.
	AnnotationParent       = "io.cohort.parent-epoch"
	AnnotationParentNumber = "io.cohort.parent-epoch-number"
	AnnotationChain        = "io.cohort.chain"

	AnnotationCutTime   = "io.cohort.cut-time"  // RFC 3339, nanoseconds, UTC
	AnnotationMembers   = "io.cohort.members"   // names in restore order, comma between
	AnnotationStopped   = "io.cohort.stopped"   // "true" if the members ended in the barrier
	AnnotationNetNS     = "io.cohort.netns"     // members with the same value shared a network namespace
	AnnotationContainer = "io.cohort.container" // container id
	AnnotationProcesses = "io.cohort.processes" // decimal
	AnnotationMemory    = "io.cohort.memory-bytes"
	AnnotationStorage   = "io.cohort.storage-bytes"
	AnnotationTerminal  = "io.cohort.terminal" // "true" if a restore needs a terminal
	AnnotationVersion   = "io.cohort.version"  // version of cohort.json

	// AnnotationLayer is on the layers that cohort adds: LayerRW or LayerCheckpoint.
	// AnnotationEpoch and AnnotationEpochNumber beside it say whose they are.
	AnnotationLayer = "io.cohort.layer"
	LayerRW         = "rw"
	LayerCheckpoint = "checkpoint"
	layerBase       = "base"

	// LabelIndex is on the image records of members and names the record of their group.
	LabelIndex = "io.cohort.index"
)

// Bounds on what is read from an image. A checkpoint of ten thousand
// processes stays well below each; memory pages have no bound but the disk's.
const (
	maxJSON     = 8 << 20 // manifest, config, index, spec, cohort.json
	maxEntries  = 1 << 18 // files in one checkpoint layer
	maxNameLen  = 255     // NAME_MAX
	maxDepth    = 16      // parent/parent/... below checkpoint/
	maxMembers  = 1024
	maxScanHead = 16 // entries that may precede cohort.json in its layer
	maxHead     = 64 << 20
)

var (
	// Compiled at first use: the shim starts once for every container.
	//
	// A member's name becomes part of a tag, so it is bound by the tag grammar of
	// the distribution spec; 76 is containerd's bound on an identifier.
	memberPattern = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,75}$`) })
	groupPattern  = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`) })
	epochPattern  = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[0-9a-f]{32}$`) })
	// CRIU's image names, criu/image-desc.c: lower case, a number in decimal or
	// hex, ".img". AMD GPU plugins use the same form.
	imagePattern = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z][a-z0-9_.-]*\.img$`) })
	filePattern  = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`) })
)

// Files beside CRIU's images: written by CRIU (stats-dump, irmap-cache, logs)
// and by runc (descriptors.json).
var imageDirFiles = map[string]bool{
	StatsDumpFile:           true,
	"stats-restore":         true,
	"irmap-cache":           true,
	"descriptors.json":      true,
	DumpLogFile:             true,
	"restore.log":           true,
	"criu.log":              true,
	"cpuinfo" + imageSuffix: true,
}

// Files at the root of the checkpoint directory.
var rootFiles = map[string]bool{
	CheckpointFile: true,
	ConfigDumpFile: true,
	SpecDumpFile:   true,
	NetworkFile:    true,
	// CRIU's working directory may be this one.
	StatsDumpFile:   true,
	DumpLogFile:     true,
	"stats-restore": true,
	"restore.log":   true,
	"irmap-cache":   true,
}

// ValidMember says whether name can name a member: [A-Za-z0-9][A-Za-z0-9_.-]*,
// at most 76 characters.
func ValidMember(name string) error {
	if !memberPattern().MatchString(name) {
		return fmt.Errorf("member name %q: use letters, digits, '_', '.' and '-', starting with a letter or digit, at most 76: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// ValidGroup says whether name can name a group.
func ValidGroup(name string) error {
	if !groupPattern().MatchString(name) {
		return fmt.Errorf("group name %q: use letters, digits, '_', '.' and '-', starting with a letter or digit, at most 128: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// FileName gives the name below files/ for the n-th captured file, mounted at
// destination. It is safe as a path element whatever the destination holds.
func FileName(n int, destination string) string {
	base := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '_', r == '-':
			return r
		}
		return '_'
	}, path.Base(destination))
	if len(base) > 64 {
		base = base[:64]
	}
	return fmt.Sprintf("%02d-%s", n, base)
}

// checkName decides whether a path relative to the checkpoint directory, clean
// and with slashes, can be part of a checkpoint.
func checkName(name string, dir bool) error {
	refuse := func(why string) error {
		return fmt.Errorf("%q in a checkpoint: %s: %w", name, why, errdefs.ErrInvalidArgument)
	}
	if name == "" || name != path.Clean(name) || path.IsAbs(name) || strings.ContainsRune(name, 0) {
		return refuse("not a clean relative path")
	}
	parts := strings.Split(name, "/")
	if len(parts) > maxDepth {
		return refuse("nested too deep")
	}
	for _, p := range parts {
		if p == ".." || p == "." || len(p) > maxNameLen {
			return refuse("not a clean relative path")
		}
	}
	last := parts[len(parts)-1]
	switch {
	case len(parts) == 1:
		if dir && (last == ImagesDir || last == FilesDir || last == TmpfsDir) || !dir && rootFiles[last] {
			return nil
		}
	case parts[0] == FilesDir || parts[0] == TmpfsDir:
		if len(parts) == 2 && !dir && filePattern().MatchString(last) {
			return nil
		}
	case parts[0] == ImagesDir:
		for _, p := range parts[1 : len(parts)-1] {
			if p != parentImagesDir {
				return refuse("unknown directory")
			}
		}
		if dir && last == parentImagesDir || !dir && (imageDirFiles[last] || imagePattern().MatchString(last)) {
			return nil
		}
	}
	return refuse("a checkpoint holds no such name")
}
