// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"bytes"
	"encoding/binary"
	"testing"

	remap "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	"google.golang.org/protobuf/proto"
)

func remaps(t *testing.T, types ...remap.RemapType) *bytes.Buffer {
	t.Helper()
	b := bytes.NewBuffer(make([]byte, imageHeader))
	for i, kind := range types {
		e, err := proto.Marshal(&remap.RemapFilePathEntry{OrigId: proto.Uint32(uint32(i)), RemapId: proto.Uint32(7), RemapType: kind.Enum()})
		if err != nil {
			t.Fatal(err)
		}
		b.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(e))))
		b.Write(e)
	}
	return b
}

func TestNamesThatCRIUMakesInTheContainerAreNoticed(t *testing.T) {
	for _, c := range []struct {
		types []remap.RemapType
		want  bool
	}{
		{nil, false},
		{[]remap.RemapType{remap.RemapType_GHOST, remap.RemapType_PROCFS}, false},
		{[]remap.RemapType{remap.RemapType_GHOST, remap.RemapType_LINKED}, true},
	} {
		if got, err := hasLinks(remaps(t, c.types...)); err != nil || got != c.want {
			t.Errorf("%v: %v, %v; want %v", c.types, got, err, c.want)
		}
	}
	for name, cut := range map[string]int{"header": 5, "size": imageHeader + 2, "entry": imageHeader + 6} {
		b := remaps(t, remap.RemapType_LINKED).Bytes()[:cut]
		if _, err := hasLinks(bytes.NewReader(b)); err == nil {
			t.Errorf("an image that ends in its %s passed", name)
		}
	}
}
